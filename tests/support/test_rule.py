"""The rule by literal numbers, and both oracles and the package's mask against each other."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import rule
from tests.support.oracle import Rule, sepllm_mask
from vllm_sepllm.policy.visibility import Policy, visible_mask


def test_a_query_by_hand() -> None:
    """a = 1 and n = 2: of the separators 1, 3 and 5 the query at 7 has left all behind."""
    is_separator = [0, 1, 0, 1, 0, 1, 0, 0]
    assert rule.visible(Policy(1, 2), is_separator, 7) == [0, 1, 3, 5, 6, 7]
    assert rule.visible(Policy(1, 2, 2), is_separator, 7) == [0, 3, 5, 6, 7]
    assert rule.visible(Policy(1, 2, 0), is_separator, 7) == [0, 6, 7]
    assert rule.visible(Policy(4, 9), is_separator, 2) == [0, 1, 2]
    assert rule.spilled(Policy(1, 2, 2), is_separator, 8) == [1, 3, 5]
    assert [rule.num_kept(Policy(1, 2, 2), is_separator, n) for n in (0, 1, 8)] == [0, 1, 5]


@given(
    st.builds(
        Policy,
        initial_tokens=st.integers(0, 5),
        window=st.integers(1, 8),
        max_separators=st.none() | st.integers(0, 5),
    ),
    st.lists(st.booleans(), min_size=1, max_size=40),
)
def test_every_spelling_is_the_same(policy: Policy, is_separator: list[bool]) -> None:
    """The scalar rule, the oracle's mask, and the package's."""
    numbers = policy.initial_tokens, policy.window
    spelled = Rule(*numbers, frozenset({1}), max_separators=policy.max_separators)
    dense = sepllm_mask([int(flag) for flag in is_separator], spelled)
    ours = visible_mask(policy, np.array(is_separator))
    assert torch.equal(dense, torch.from_numpy(ours))
    for query in range(len(is_separator)):
        assert np.flatnonzero(ours[query]).tolist() == rule.visible(policy, is_separator, query)


def test_an_interval_counts_positions() -> None:
    """Every third token, whatever its id; the query at 8 reads the last two and 0, 3 and 6."""
    mask = sepllm_mask([5] * 9, Rule(0, 2, frozenset(), interval=3))
    assert mask[8].nonzero().ravel().tolist() == [0, 3, 6, 7, 8]
