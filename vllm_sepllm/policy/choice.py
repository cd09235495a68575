"""The policy that a request chooses for itself, as plain values of its ``extra_args``.

A request may choose its window, ``{"sepllm_window": 1024}``, and its initial tokens,
``{"sepllm_initial_tokens": 600}``, or full attention, ``{"sepllm": false}``: a window as long as
any request, which is vLLM's own layout throughout. Separators and max_separators stay the engine's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.visibility import Policy

PREFIX = "sepllm"
SWITCH_KEY = "sepllm"
WINDOW_KEY = "sepllm_window"
INITIAL_KEY = "sepllm_initial_tokens"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What an engine lets its requests choose.

    Attributes:
        engine: its own policy, which a request has that chooses nothing and protects no prefix.
        initial: the initial tokens of a request that does not choose them.
        max_model_len: tokens of the longest request.
        min_window: smallest window that the engine can serve.
        is_trained: the model was trained with the engine's policy.
    """

    engine: Policy
    initial: Initial
    max_model_len: int
    min_window: int
    is_trained: bool = False

    @property
    def full(self) -> Policy:
        """Full attention: no token of any request leaves the window."""
        return replace(self.engine, window=max(self.engine.window, self.max_model_len))


def chosen_keys(given: Mapping[str, object] | None) -> list[str]:
    """The keys that are meant for us, whatever their case: none of them may be ignored."""
    return [key for key in given or () if isinstance(key, str) and key.lower().startswith(PREFIX)]


def request_policy(
    limits: RequestLimits,
    given: Mapping[str, object] | None,
    prompt: Sequence[int],
    *,
    is_session: bool = False,
) -> Policy:
    """The policy of a request: a function of the engine and of what the request gives.

    Args:
        limits: of the engine.
        given: the request's ``extra_args``; other keys are not looked at.
        prompt: its token ids; of a session those of the first turn, in which a protected prefix
            must end.
        is_session: the request's prompt goes on in later requests (streaming input).

    Raises:
        ValueError: one sentence: what was given, what may be given instead.
    """
    keys = chosen_keys(given)
    own = replace(limits.engine, initial_tokens=limits.initial.of(prompt))
    if not keys or given is None:
        return own
    unknown = [key for key in keys if key not in (SWITCH_KEY, WINDOW_KEY, INITIAL_KEY)]
    if unknown:
        raise ValueError(
            f"unknown key {_shown(unknown[0])} in the request's extra arguments; sepllm knows "
            f"{SWITCH_KEY!r} (true or false), {WINDOW_KEY!r} and {INITIAL_KEY!r} (numbers of "
            "tokens)"
        )
    is_on = SWITCH_KEY not in given or _switch(given[SWITCH_KEY])
    policy = own if is_on else limits.full
    if WINDOW_KEY in given:
        policy = replace(policy, window=_tokens(limits, given, WINDOW_KEY, limits.min_window))
    if INITIAL_KEY in given:
        policy = replace(policy, initial_tokens=_tokens(limits, given, INITIAL_KEY, 0))
    for key in (WINDOW_KEY, INITIAL_KEY):
        if key in given and not is_on:
            raise ValueError(
                f"{SWITCH_KEY} is false, which is full attention, and {key} is {given[key]!r}, "
                "which is not; give one of the two"
            )
    if policy != own and limits.is_trained:
        raise ValueError(
            f"the model was trained with a window of {own.window} and {own.initial_tokens} initial "
            "tokens, and others make another model of it; remove "
            f"{' and '.join(sorted(keys))} from the request"
        )
    if policy != own and is_session:
        raise ValueError(
            "a session of streaming input has the engine's policy throughout; remove "
            f"{' and '.join(sorted(keys))} from the request, or send the whole prompt at once"
        )
    return policy


def is_unprotected(
    limits: RequestLimits, given: Mapping[str, object] | None, prompt: Sequence[int]
) -> bool:
    """Whether a served request has no prefix to protect, although the engine protects one.

    A request that chooses its initial tokens, or full attention, forgets nothing unasked.
    """
    given = given or {}
    is_own_choice = INITIAL_KEY in given or not given.get(SWITCH_KEY, True)
    return not (is_own_choice or limits.initial.is_in(prompt))


def _shown(given: object) -> str:
    return f"{given!r:.60}"


def _switch(given: object) -> bool:
    """True: the engine's policy. vLLM's server turns JSON's true and false into 1 and 0."""
    if type(given) not in (bool, int) or given not in (0, 1):
        raise ValueError(
            f"{SWITCH_KEY} must be true (the engine's policy) or false (full attention for this "
            f"request), got {_shown(given)}"
        )
    return bool(given)


def _tokens(limits: RequestLimits, given: Mapping[str, object], key: str, least: int) -> int:
    number = given[key]
    if type(number) is not int:  # a bool is an int to isinstance
        raise ValueError(f"{key} must be an integer number of tokens, got {_shown(number)}")
    if number < least:
        raise ValueError(f"{key} must be at least {least} here, got {number}")
    if number > limits.max_model_len:
        raise ValueError(
            f"{key} must be at most max_model_len, which is {limits.max_model_len}, got {number}; "
            f"full attention is {SWITCH_KEY}: false"
        )
    return number
