"""HTTP endpoints whose bodies lose our keys, through vLLM's own routes; no engine."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.anthropic import api_router as messages_api
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.generative_scoring import api_router as scoring_api
from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.entrypoints.generate.structured_decisions import api_router as decisions_api
from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.scale_out.render import api_router as render_api
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.scale_out.token_in_token_out import api_router as tokens_api
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMClientError

from vllm_sepllm.integration.frontend import request_bodies

CHAT = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}
TOKENS = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}
SCORES = {"query": "a", "items": ["b"], "label_token_ids": [1]}
DECISION = {"state": "a", "questions": {"q": {"type": "bool"}}}


class Reached(VLLMClientError):
    """The handler went on to what it asks of vLLM first."""


async def reached(self: object, request: object, *args: object) -> None:
    asked = request.vllm_xargs if isinstance(request, ChatCompletionRequest) else None
    raise Reached(f"reached with {asked}")


async def no_effort(request: object) -> str:
    return "none"


def made(base: type) -> Any:
    """A handler without an engine, which ends as soon as vLLM's own code would go on."""
    steps = ("create_chat_completion", "render_chat_request", "_check_model")
    handler = object.__new__(type(base.__name__, (base,), dict.fromkeys(steps, reached)))
    handler._merge_inline_system = False
    # new in vLLM 0.33
    handler.disabled_thinking_effort_resolver = SimpleNamespace(resolve_for=no_effort)
    handler._disabled_thinking_effort_resolver = handler.disabled_thinking_effort_resolver
    return handler


@pytest.fixture(scope="module")
def client() -> TestClient:
    request_bodies.install()
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)
    for api in (messages_api, scoring_api, decisions_api, render_api, tokens_api):
        app.include_router(api.router)
    app.state.anthropic_serving_messages = made(AnthropicServingMessages)
    app.state.serving_generative_scoring = made(ServingGenerativeScoring)
    app.state.serving_structured_decisions = made(ServingStructuredDecisions)
    app.state.serving_render = made(ServingRender)
    app.state.serving_tokens = made(ServingTokens)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("path", "body", "remedy"),
    [
        ("/v1/messages", CHAT | {"sepllm_window": 64}, "put it into vllm_xargs"),
        ("/v1/messages", CHAT | {"sepllm": False, "stream": True}, "put it into vllm_xargs"),
        ("/v1/messages/render", CHAT | {"SEPLLM": False}, "put it into vllm_xargs"),
        ("/inference/v1/generate", TOKENS | {"sepllm": False}, "put it into extra_args"),
        (
            "/inference/v1/generate",
            TOKENS | {"vllm_xargs": {"sepllm": False}},
            "put it into extra_args",
        ),
        (
            "/inference/v1/generate",
            TOKENS | {"sampling_params": {"sepllm_window": 64}},
            "put it into extra_args",
        ),
        ("/generative_scoring", SCORES | {"sepllm_window": 64}, "remove it"),
        ("/generative_scoring", SCORES | {"vllm_xargs": {"sepllm": False}}, "remove it"),
        # vLLM 0.33 refuses these itself
        ("/v1/systemone", DECISION | {"sepllm_window": 64}, ""),
        ("/v1/systemone", DECISION | {"vllm_xargs": {"sepllm": False}}, ""),
    ],
)
def test_a_key_that_would_be_dropped_is_refused(
    client: TestClient, path: str, body: dict[str, Any], remedy: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert remedy in answer.text
    assert "reached" not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "xargs"),
    [
        ("/v1/messages", CHAT, None),
        ("/v1/messages", CHAT | {"vllm_xargs": {"sepllm_window": 64}}, {"sepllm_window": 64}),
        ("/v1/messages/render", CHAT | {"vllm_xargs": {"sepllm": 0}}, {"sepllm": 0}),
        (
            "/inference/v1/generate",
            TOKENS | {"sampling_params": {"extra_args": {"sepllm": False}}},
            None,
        ),
        ("/generative_scoring", SCORES, None),
        ("/v1/systemone", DECISION, None),
    ],
)
def test_other_bodies_reach_vllm(
    client: TestClient, path: str, body: dict[str, Any], xargs: object
) -> None:
    assert f"reached with {xargs}" in client.post(path, json=body).text
