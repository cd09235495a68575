"""Requests that the soak's server must refuse."""

from typing import Any


def wrong_fields(
    prompt: list[int], vocab_size: int, max_model_len: int
) -> tuple[dict[str, Any], ...]:
    """Fields of a completion request, each set wrong in a way of its own.

    ``prompt`` is right.
    """
    return (
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"n": 0},
        {"model": "no-such-model"},
        {"prompt": {"text": 1}},
        {"prompt": [vocab_size + 10**6]},
        {"prompt": prompt * max_model_len},
        {"min_tokens": 9, "max_tokens": 8},
        {"stream": "perhaps"},
        {"vllm_xargs": {"sepllm_window": 3}},
        {"vllm_xargs": {"sepllm_initial_tokens": -1}},
        {"vllm_xargs": {"sepllm": "no"}},
        {"vllm_xargs": {"sepllm_windows": 64}},
        {"vllm_xargs": {"sepllm": False, "sepllm_window": 64}},
    )
