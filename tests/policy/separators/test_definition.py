"""What makes a token a separator: the array form agrees with the definition, from any position."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.separators.definition import IntervalSeparators, TokenSeparators

TOKEN_IDS = st.lists(st.integers(0, 40), max_size=40)


@given(st.sets(st.integers(0, 20)), TOKEN_IDS, st.integers(0, 100))
def test_token_separators_go_by_id_alone(ids: set[int], text: list[int], first: int) -> None:
    """Ids past the highest separator, as of added tokens, are none."""
    separators = TokenSeparators(tuple(ids))
    wanted = [token_id in ids for token_id in text]
    assert separators.mask(text, first).tolist() == wanted
    assert [separators.includes(t, first + i) for i, t in enumerate(text)] == wanted


@given(st.integers(1, 9), TOKEN_IDS, st.integers(0, 100))
def test_interval_separators_go_by_position_alone(
    interval: int, text: list[int], first: int
) -> None:
    separators = IntervalSeparators(interval)
    wanted = [(first + i) % interval == 0 for i in range(len(text))]
    assert separators.mask(text, first).tolist() == wanted
    assert [separators.includes(t, first + i) for i, t in enumerate(text)] == wanted
