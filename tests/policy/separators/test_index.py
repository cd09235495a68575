"""Growing the list of separators in any portions gives the same list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.separators.definition import IntervalSeparators, TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.visibility import Policy

SEPARATORS = TokenSeparators((1,))


@given(
    st.lists(st.integers(0, 1), max_size=60),
    st.lists(st.integers(0, 60), max_size=12),
    st.integers(0, 5),
)
def test_portions_do_not_matter(token_ids: list[int], stops: list[int], initial: int) -> None:
    index = SeparatorIndex(Policy(initial, 4), SEPARATORS)
    for stop in [*stops, len(token_ids)]:
        index.extend(token_ids, min(stop, len(token_ids)))
    want = [i for i, t in enumerate(token_ids) if t and i >= initial]
    assert index.positions(0, len(want)).tolist() == want
    assert [index.count_below(p) for p in range(61)] == [
        sum(w < p for w in want) for p in range(61)
    ]


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=12),
    st.integers(0, 5),
)
def test_portions_and_cuts_do_not_matter_to_a_rule_of_two_tokens(
    token_ids: list[int], stops: list[tuple[int, bool]], initial: int
) -> None:
    """Token 2 counts behind a 1; a cut forgets tokens, and others take their place."""
    index = SeparatorIndex(Policy(initial, 4), TokenSeparators((1,), (2,), (1, 3)))
    seen = [1] * 60  # what stands where a cut is made
    for stop, is_cut in stops:
        if is_cut:
            index.truncate(stop)
            seen = [*seen[:stop], *token_ids[stop:], *seen[len(token_ids) :]][:60]
        else:
            index.extend(seen, stop)
    index.truncate(0)
    for stop, _ in [*stops, (len(token_ids), False)]:
        index.extend(token_ids, min(stop, len(token_ids)))
    pairs = list(enumerate(zip(token_ids, [0, *token_ids], strict=False)))
    want = [i for i, (t, p) in pairs if i >= initial and (t == 1 or (t == 2 and p in (1, 3)))]
    assert index.positions(0, len(want)).tolist() == want


def test_a_token_behind_a_cut_is_read_with_the_new_token_before_it() -> None:
    index = SeparatorIndex(Policy(0, 4), TokenSeparators((), (2,), (1,)))
    index.extend([0, 2, 2], 3)
    index.truncate(1)
    index.extend([0, 1, 2], 3)
    assert index.positions(0, 9).tolist() == [2]
    index.truncate(2)
    # the token before the cut stays, and is read again
    index.extend([0, 1, 2, 2], 4)
    assert index.positions(0, 9).tolist() == [2]


def test_unknown_tokens_are_an_error_not_a_short_list() -> None:
    index = SeparatorIndex(Policy(0, 4), SEPARATORS)
    with pytest.raises(IndexError, match="up to position 3 were asked for, but only 2"):
        index.extend([1, 1], 3)


def test_truncated_tokens_are_read_again() -> None:
    index = SeparatorIndex(Policy(1, 4), SEPARATORS)
    index.extend([1, 1, 0, 1], 4)
    index.truncate(2)
    index.extend([1, 1, 1, 0, 1], 5)
    assert index.positions(0, 9).tolist() == [1, 2, 4]


@given(
    st.integers(1, 9), st.lists(st.integers(0, 60), max_size=12), st.integers(0, 5), st.booleans()
)
def test_an_interval_reads_positions_alone(
    interval: int, stops: list[int], initial: int, is_cut: bool
) -> None:
    index = SeparatorIndex(Policy(initial, 4), IntervalSeparators(interval))
    for stop in sorted(stops):
        index.extend([1] * 60, stop)
    if is_cut:
        index.truncate(17)
    index.extend([0] * 60, 60)
    want = [i for i in range(initial, 60) if i % interval == 0]
    assert index.positions(0, 99).tolist() == want
