"""Whatever a request gives: one clear sentence or the policy that it asks for, nothing else."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.choice import RequestLimits, chosen_keys, is_unprotected, request_policy
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.visibility import Policy

ENGINE = Policy(4, 60, 100)
LIMITS = RequestLimits(ENGINE, Initial(4), max_model_len=1024, min_window=16)

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
    [
        *("sepllm", "sepllm_window", "sepllm_initial_tokens", "sepllm_", "SepLLM"),
        *("sepllm_separators", "sepllm_" + "x" * 500, "top_k", "window", ""),
    ]
)


def wanted(given: dict[str, Any]) -> Policy | None:
    """The policy by the words of docs/configuration.md; None: refused."""
    ours = {key: value for key, value in given.items() if key.lower().startswith("sepllm")}
    numbers = {"sepllm_initial_tokens", "sepllm_window"}
    if not set(ours) <= {"sepllm", *numbers}:
        return None
    window, initial = ours.get("sepllm_window", 60), ours.get("sepllm_initial_tokens", 4)
    for number, least in ((window, 16), (initial, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= 1024:
            return None
    switch = ours.get("sepllm", True)
    if not isinstance(switch, bool | int) or switch not in (True, False):
        return None
    if not switch:
        return None if numbers & ours.keys() else Policy(4, 1024, 100)
    return Policy(initial, window, 100)


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
        ({"sepllm_initial_tokens": True}, "sepllm_initial_tokens must be an integer .*, got True"),
        ({"sepllm_initial_tokens": 6.5}, r"sepllm_initial_tokens must be an integer .*, got 6\.5"),
        ({"sepllm_initial_tokens": "9"}, "sepllm_initial_tokens must be an integer .*, got '9'"),
        ({"sepllm_initial_tokens": None}, "sepllm_initial_tokens must be an integer .*, got None"),
        ({"sepllm_initial_tokens": -1}, "sepllm_initial_tokens must be at least 0 here, got -1"),
        ({"sepllm_initial_tokens": 1025}, "at most max_model_len, which is 1024, got 1025"),
        ({"sepllm": 0, "sepllm_initial_tokens": 64}, "sepllm_initial_tokens is 64, which is not;"),
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
    assert request_policy(LIMITS, {"sepllm_initial_tokens": 0}, []) == Policy(0, 60, 100)
    both = {"sepllm_initial_tokens": 1024, "sepllm_window": 16}
    assert request_policy(LIMITS, both, []) == Policy(1024, 16, 100)
    assert request_policy(LIMITS, {"sepllm": 0}, []) == replace(ENGINE, window=1024)
    assert request_policy(LIMITS, {"sepllm": False}, []) == LIMITS.full
    assert chosen_keys({"sepllm": 1, 3: 4, "x": 2}) == ["sepllm"]  # type: ignore[dict-item]


END = 2
PROTECTING = replace(LIMITS, initial=Initial(4, END, max_tokens=50))
PROMPT, PLAIN = [9] * 29 + [END] + [9] * 70, [9] * 100


def test_a_protected_prefix_is_initial_unless_the_request_says_otherwise() -> None:
    for asked, policy in (
        (None, Policy(30, 60, 100)),
        ({"sepllm": True}, Policy(30, 60, 100)),
        ({"sepllm_window": 64}, Policy(30, 64, 100)),
        ({"sepllm_initial_tokens": 7}, Policy(7, 60, 100)),
        ({"sepllm": False}, Policy(4, 1024, 100)),
    ):
        assert request_policy(PROTECTING, asked, PROMPT) == policy
    assert request_policy(PROTECTING, None, PLAIN) == ENGINE
    session = request_policy(PROTECTING, None, PROMPT, is_session=True)
    assert session == Policy(30, 60, 100)


@pytest.mark.parametrize(
    ("limits", "given", "prompt", "is_counted"),
    [
        (PROTECTING, None, PLAIN, True),
        (PROTECTING, {"sepllm_window": 64, "sepllm": True}, PLAIN, True),
        (PROTECTING, None, PROMPT, False),
        (PROTECTING, {"sepllm_initial_tokens": 7}, PLAIN, False),
        (PROTECTING, {"sepllm": False}, PLAIN, False),
        (LIMITS, None, PLAIN, False),
    ],
)
def test_who_forgets_its_beginning_unasked(
    limits: RequestLimits, given: dict[str, Any] | None, prompt: list[int], is_counted: bool
) -> None:
    assert is_unprotected(limits, given, prompt) is is_counted


def test_full_attention_is_no_smaller_than_an_engine_window_beyond_the_model() -> None:
    limits = replace(LIMITS, engine=Policy(4, 5000, 0))
    assert request_policy(limits, {"sepllm": False}, []) == limits.engine


@pytest.mark.parametrize(
    "given", [{"sepllm": False}, {"sepllm_window": 64}, {"sepllm_initial_tokens": 3}]
)
def test_trained_models_and_sessions_have_the_policy_of_the_engine(given: dict[str, Any]) -> None:
    trained = replace(LIMITS, is_trained=True)
    with pytest.raises(ValueError, match="was trained with a window of 60"):
        request_policy(trained, given, [])
    with pytest.raises(ValueError, match="session of streaming input"):
        request_policy(LIMITS, given, [], is_session=True)
    same = {"sepllm": True, "sepllm_window": 60, "sepllm_initial_tokens": 4}
    assert (
        request_policy(trained, same, [])
        == request_policy(LIMITS, same, [], is_session=True)
        == ENGINE
    )
