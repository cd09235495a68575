"""Fields of an HTTP request that are meant for us and that vLLM's server drops without a word.

``sepllm_window`` beside ``model`` instead of in ``vllm_xargs``, and ``vllm_xargs`` of a beam
search, never reach the engine, so they are refused: where the server makes parameters of a body,
or, where a body has lost them by then, in the handler that still has the JSON.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

from vllm_sepllm.integration.frontend.request_choices import RequestRefused
from vllm_sepllm.integration.patch import wrap_once
from vllm_sepllm.policy.choice import chosen_keys

_Body = ChatCompletionRequest | CompletionRequest | ResponsesRequest

_XARGS = 'put it into vllm_xargs, such as {"vllm_xargs": {"sepllm_window": 1024}}'
_EXTRA_ARGS = (
    "put it into extra_args of sampling_params, such as "
    '{"sampling_params": {"extra_args": {"sepllm_window": 1024}}}'
)
_NOWHERE = "remove it: requests of this endpoint have the engine's policy"


class _RawRequest(Protocol):
    """Starlette's, which keeps the body that was read for the handler."""

    async def json(self) -> dict[str, object]: ...


def install() -> None:
    """Look at bodies on their way to the engine; once per process."""
    for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap_once(body, "to_sampling_params", _checked(_check_place))
    for body in (ChatCompletionRequest, CompletionRequest):
        wrap_once(body, "to_beam_search_params", _checked(_check_beam_search))
    wrap_once(AnthropicServingMessages, "create_messages", _json_checked((), _XARGS))
    wrap_once(ServingRender, "render_messages_request", _json_checked((), _XARGS))
    dropped = ("vllm_xargs", "sampling_params")
    wrap_once(ServingTokens, "serve_tokens", _json_checked(dropped, _EXTRA_ARGS))
    unchosen = _json_checked(("vllm_xargs",), _NOWHERE)
    wrap_once(ServingGenerativeScoring, "create_generative_scoring", unchosen)
    wrap_once(ServingStructuredDecisions, "create_decision", unchosen)


def _checked(check: Callable[[_Body], None]) -> Callable[..., Any]:
    def around(original: Callable[..., Any], self: _Body, *args: Any, **kwargs: Any) -> Any:
        check(self)
        return original(self, *args, **kwargs)

    return around


def _check_place(body: _Body) -> None:
    if keys := chosen_keys(body.model_extra):
        raise RequestRefused(f"{keys[0]!r} is no field of the OpenAI API; {_XARGS}")


def _check_beam_search(body: _Body) -> None:
    _check_place(body)
    if keys := chosen_keys(body.vllm_xargs):
        raise RequestRefused(
            f"{keys[0]!r} does not reach the requests that a beam search is made of; remove it "
            "from vllm_xargs, or use_beam_search"
        )


def _json_checked(objects: tuple[str, ...], remedy: str) -> Callable[..., Any]:
    """Around a handler that reads our keys neither in its JSON nor in these objects of it."""

    async def around(
        original: Callable[..., Awaitable[Any]],
        self: object,
        request: object,
        raw_request: _RawRequest | None = None,
    ) -> Any:
        given = {} if raw_request is None else await raw_request.json()
        for place in (given, *(given.get(name) for name in objects)):
            if keys := chosen_keys(place if isinstance(place, Mapping) else None):
                raise RequestRefused(f"{keys[0]!r} is not read where it stands; {remedy}")
        return await original(self, request, raw_request)

    return around
