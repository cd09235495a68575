"""The rule itself, with literals: a property test alone passed an off-by-one window."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import rule
from vllm_sepllm.policy.visibility import Policy, visible_mask

policies = st.builds(
    Policy,
    initial_tokens=st.integers(0, 5),
    window=st.integers(1, 8),
    max_separators=st.none() | st.integers(0, 5),
)
flags = st.lists(st.booleans(), min_size=1, max_size=40)


def row(policy: Policy, is_separator: list[bool], query: int) -> list[int]:
    mask = visible_mask(policy, np.array(is_separator))
    return np.flatnonzero(mask[query]).tolist()


def test_the_window_counts_the_query() -> None:
    assert row(Policy(0, 2), [False] * 5, 4) == [3, 4]
    assert row(Policy(0, 1), [False] * 5, 4) == [4]


def test_initial_tokens_and_separators_stay() -> None:
    is_separator = [False, True, False, True, False, True, False, False]
    assert row(Policy(1, 2), is_separator, 7) == [0, 1, 3, 5, 6, 7]


def test_only_the_latest_separators_stay_when_bounded() -> None:
    is_separator = [True, True, True, True, True, False, False, False]
    # far from query 7 with window 2: positions 1..5, of which 1..4 are separators
    assert row(Policy(1, 2, 2), is_separator, 7) == [0, 3, 4, 6, 7]
    # a separator inside the window or among the initial tokens does not use up the bound
    assert row(Policy(1, 4, 1), is_separator, 7) == [0, 3, 4, 5, 6, 7]
    assert row(Policy(1, 2, 0), is_separator, 7) == [0, 6, 7]


def test_no_separator_is_the_streaming_llm_mask() -> None:
    assert row(Policy(2, 3), [False] * 10, 9) == [0, 1, 7, 8, 9]


@given(policies, flags)
def test_mask_is_the_rule(policy: Policy, is_separator: list[bool]) -> None:
    for query in range(len(is_separator)):
        assert row(policy, is_separator, query) == rule.visible(policy, is_separator, query)


@given(policies, flags)
def test_what_one_query_cannot_read_no_later_one_reads(
    policy: Policy, is_separator: list[bool]
) -> None:
    """The ground on which KV is overwritten."""
    mask = visible_mask(policy, np.array(is_separator))
    for query in range(1, len(is_separator)):
        reads_again = mask[query, :query] & ~mask[query - 1, :query]
        assert not reads_again.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4, None), "initial_tokens must be >= 0, got -1"),
        ((0, 0, None), r"window must be >= 1 .* got 0"),
        ((0, 4, -2), "max_separators must be >= 0 or None, got -2"),
    ],
)
def test_impossible_numbers_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(*arguments)
