"""Whatever a request gives: one clear sentence or the policy that it asks for, nothing else."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.choice import RequestLimits, chosen_keys, request_policy
from vllm_sepllm.policy.initial import FixedInitial
from vllm_sepllm.policy.visibility import Policy

ENGINE = Policy(4, 60, 100)
LIMITS = RequestLimits(ENGINE, FixedInitial(4), max_model_len=1024, min_window=16)

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2000),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["64", "true", [64], [True], {"n": 64}, 64.0, 0, 1]),
)
keys = st.sampled_from(
    ["sepllm", "sepllm_window", "sepllm_", "SepLLM", "sepllm_separators", "top_k", "window", ""]
)


def wanted(given: dict[str, Any]) -> Policy | None:
    """The policy by the words of docs/configuration.md; None: refused."""
    ours = {key: value for key, value in given.items() if key.lower().startswith("sepllm")}
    if not set(ours) <= {"sepllm", "sepllm_window"}:
        return None
    window = ours.get("sepllm_window", 60)
    if isinstance(window, bool) or not isinstance(window, int) or not 16 <= window <= 1024:
        return None
    switch = ours.get("sepllm", True)
    if not isinstance(switch, bool | int) or switch not in (True, False):
        return None
    if not switch:
        return None if "sepllm_window" in ours else Policy(4, 1024, 100)
    return Policy(4, window, 100)


@given(st.dictionaries(keys, values, max_size=4))
def test_a_clear_error_or_the_right_policy(given: dict[str, Any]) -> None:
    try:
        got = request_policy(LIMITS, given, [])
    except ValueError as error:
        assert wanted(given) is None
        text = str(error)
        assert "sepllm" in text.lower()
        assert len(text) < 300
        assert "\n" not in text
    else:
        assert got == wanted(given)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sepllm_windows": 64}, "unknown key 'sepllm_windows'"),
        ({"SEPLLM": False}, "unknown key 'SEPLLM'"),
        ({"sepllm": "false"}, "sepllm must be true .* or false .*, got 'false'"),
        ({"sepllm": 0.0}, r"sepllm must be .*, got 0\.0"),
        ({"sepllm": 2}, "sepllm must be .*, got 2"),
        ({"sepllm": None}, "sepllm must be .*, got None"),
        ({"sepllm_window": True}, "sepllm_window must be an integer .*, got True"),
        ({"sepllm_window": 64.0}, r"sepllm_window must be an integer .*, got 64\.0"),
        ({"sepllm_window": "64"}, "sepllm_window must be an integer .*, got '64'"),
        ({"sepllm_window": 0}, "sepllm_window must be at least 16 here, got 0"),
        ({"sepllm_window": -1}, "sepllm_window must be at least 16 here, got -1"),
        ({"sepllm_window": 1025}, "at most max_model_len, which is 1024, got 1025"),
        ({"sepllm": False, "sepllm_window": 64}, "give one of the two"),
    ],
)
def test_sentences(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        request_policy(LIMITS, given, [])


def test_literals() -> None:
    """JSON's booleans arrive as 0 and 1 from vLLM's server."""
    assert request_policy(LIMITS, None, []) == request_policy(LIMITS, {"seed": 3}, []) == ENGINE
    assert (
        request_policy(LIMITS, {"sepllm": True}, [])
        == request_policy(LIMITS, {"sepllm": 1}, [])
        == ENGINE
    )
    assert request_policy(LIMITS, {"sepllm_window": 16}, []) == replace(ENGINE, window=16)
    assert request_policy(LIMITS, {"sepllm": 0}, []) == replace(ENGINE, window=1024)
    assert request_policy(LIMITS, {"sepllm": False}, []) == LIMITS.full
    assert chosen_keys({"sepllm": 1, 3: 4, "x": 2}) == ["sepllm"]  # type: ignore[dict-item]


def test_full_attention_is_no_smaller_than_an_engine_window_beyond_the_model() -> None:
    limits = replace(LIMITS, engine=Policy(4, 5000, 0))
    assert request_policy(limits, {"sepllm": False}, []) == limits.engine


@pytest.mark.parametrize("given", [{"sepllm": False}, {"sepllm_window": 64}])
def test_trained_models_and_sessions_have_the_policy_of_the_engine(given: dict[str, Any]) -> None:
    trained = replace(LIMITS, is_trained=True)
    with pytest.raises(ValueError, match="was trained with a window of 60"):
        request_policy(trained, given, [])
    with pytest.raises(ValueError, match="session of streaming input"):
        request_policy(LIMITS, given, [], is_session=True)
    same = {"sepllm": True, "sepllm_window": 60}
    assert (
        request_policy(trained, same, [])
        == request_policy(LIMITS, same, [], is_session=True)
        == ENGINE
    )
