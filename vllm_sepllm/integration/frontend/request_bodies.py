"""Fields of an HTTP request that are meant for us and that vLLM's server drops without a word.

``sepllm_window`` beside ``model`` instead of in ``vllm_xargs``, and ``vllm_xargs`` of a beam
search, never reach the engine, so they are refused where the server makes parameters of a body.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from vllm_sepllm.integration.frontend.request_choices import RequestRefused
from vllm_sepllm.policy.choice import chosen_keys

_Body = ChatCompletionRequest | CompletionRequest | ResponsesRequest


def install() -> None:
    """Look at bodies on their way to the engine; once per process."""
    if getattr(ChatCompletionRequest.to_sampling_params, "is_sepllm", False):
        return
    for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _check_before(body, "to_sampling_params", _check_place)
    for body in (ChatCompletionRequest, CompletionRequest):
        _check_before(body, "to_beam_search_params", _check_beam_search)


def _check_before(body: type[_Body], name: str, check: Callable[[_Body], None]) -> None:
    original = getattr(body, name)

    @functools.wraps(original)
    def checked(self: _Body, *args: Any, **kwargs: Any) -> Any:
        check(self)
        return original(self, *args, **kwargs)

    setattr(checked, "is_sepllm", True)  # noqa: B010  # a function has no such field
    setattr(body, name, checked)


def _check_place(body: _Body) -> None:
    if keys := chosen_keys(body.model_extra):
        raise RequestRefused(
            f"{keys[0]!r} is no field of the OpenAI API; put it into vllm_xargs, such as "
            '{"vllm_xargs": {"sepllm_window": 1024}}'
        )


def _check_beam_search(body: _Body) -> None:
    _check_place(body)
    if keys := chosen_keys(body.vllm_xargs):
        raise RequestRefused(
            f"{keys[0]!r} does not reach the requests that a beam search is made of; remove it "
            "from vllm_xargs, or use_beam_search"
        )
