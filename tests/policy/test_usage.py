"""The metrics' sums are those of the definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support import rule
from vllm_sepllm.policy.usage import Usage, label, usage
from vllm_sepllm.policy.visibility import Policy


@given(
    policy=st.builds(
        Policy,
        initial_tokens=st.integers(0, 4),
        window=st.integers(1, 20),
        max_separators=st.none() | st.integers(0, 9),
    ),
    requests=st.lists(st.lists(st.booleans(), min_size=1, max_size=90), max_size=5),
    sizes=st.lists(st.sampled_from([4, 7, 16]), min_size=1, max_size=3),
)
def test_kept_tokens_are_what_the_last_query_reads(
    policy: Policy, requests: list[list[bool]], sizes: list[int]
) -> None:
    logical = kept = saved = 0
    spilled = []
    for separators in requests:
        num_tokens = len(separators)
        held = rule.num_kept(policy, separators, num_tokens)
        spilled.append(len(rule.spilled(policy, separators, num_tokens)))
        logical += num_tokens
        kept += held
        for size in sizes:
            saved += len(range(0, num_tokens, size)) - len(range(0, held, size))
    lengths = np.array([len(r) for r in requests], dtype=np.int64)
    found = usage(policy, lengths, np.array(spilled, dtype=np.int64), sizes)
    assert found == Usage(logical, kept, saved)


def test_a_window_as_long_as_any_request_is_full_attention() -> None:
    assert [label(n, 512) for n in (252, 511, 512, 600)] == [
        "252",
        "511",
        "full",
        "full",
    ]


def test_one_request_by_hand() -> None:
    """100 tokens, 10 of 90 far ones separators: 4 + 6 + 10 are kept, 2 blocks of 16 for 7."""
    found = usage(Policy(4, 6), np.array([100]), np.array([10]), [16])
    assert found == Usage(logical_tokens=100, kept_tokens=20, blocks_saved=5)
