"""What makes a token a separator: the array form agrees with the definition, from any position."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.separators.definition import IntervalSeparators, TokenSeparators

TOKEN_IDS = st.lists(st.integers(0, 40), max_size=40)
SOME = st.sets(st.integers(0, 20))
PREVIOUS = st.one_of(st.none(), st.integers(0, 40))


def before(text: list[int], previous: int | None) -> list[int | None]:
    """The token before each one."""
    return [previous, *text][: len(text)]


@given(SOME, TOKEN_IDS, st.integers(0, 100), PREVIOUS)
def test_token_separators_go_by_id_alone(
    ids: set[int], text: list[int], first: int, previous: int | None
) -> None:
    """Ids past the highest separator, as of added tokens, are none."""
    separators = TokenSeparators(tuple(ids))
    wanted = [token_id in ids for token_id in text]
    assert separators.mask(text, first, previous).tolist() == wanted
    pairs = enumerate(zip(text, before(text, previous), strict=True))
    assert [separators.includes(t, first + i, p) for i, (t, p) in pairs] == wanted


@given(SOME, SOME, SOME, TOKEN_IDS, PREVIOUS)
def test_line_breaks_go_by_the_token_before(
    ids: set[int], breaks: set[int], closers: set[int], text: list[int], previous: int | None
) -> None:
    """A token may be all three."""
    separators = TokenSeparators(tuple(ids), tuple(breaks), tuple(closers))
    pairs = list(zip(text, before(text, previous), strict=True))
    wanted = [t in ids or (t in breaks and p in closers) for t, p in pairs]
    assert separators.mask(text, 0, previous).tolist() == wanted
    assert [separators.includes(t, i, p) for i, (t, p) in enumerate(pairs)] == wanted


@given(st.integers(1, 9), TOKEN_IDS, st.integers(0, 100))
def test_interval_separators_go_by_position_alone(
    interval: int, text: list[int], first: int
) -> None:
    separators = IntervalSeparators(interval)
    wanted = [(first + i) % interval == 0 for i in range(len(text))]
    assert separators.mask(text, first, 7).tolist() == wanted
    assert [separators.includes(t, first + i, 7) for i, t in enumerate(text)] == wanted
