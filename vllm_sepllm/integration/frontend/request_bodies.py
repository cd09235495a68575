"""Fields of an HTTP request that are meant for us and that vLLM's server drops without a word.

``sepllm_window`` beside ``model`` instead of in ``vllm_xargs``, and ``vllm_xargs`` of a beam
search, never reach the engine, so they are refused where the server makes parameters of a body.
"""

from collections.abc import Callable
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from vllm_sepllm.integration.frontend.request_choices import RequestRefused
from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.policy.choice import chosen_keys

_Body = ChatCompletionRequest | CompletionRequest | ResponsesRequest


def install() -> None:
    """Look at bodies on their way to the engine; once per process."""
    for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap_once(body, "to_sampling_params", _checked(_check_place))
    for body in (ChatCompletionRequest, CompletionRequest):
        wrap_once(body, "to_beam_search_params", _checked(_check_beam_search))


def _checked(check: Callable[[_Body], None]) -> Callable[..., Any]:
    def around(original: Callable[..., Any], self: _Body, *args: Any, **kwargs: Any) -> Any:
        check(self)
        return original(self, *args, **kwargs)

    return around


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
