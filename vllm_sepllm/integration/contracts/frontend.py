"""Names of the front end that types do not show, or that we write."""

from vllm_sepllm.integration.contracts.contract import by_hand

_PLACE = {"to_sampling_params": "wrapped: model_extra of a body is dropped"}
_HANDLER = "wrapped: what its body has lost is in the JSON"
_BEAM_SEARCH = {"to_beam_search_params": "wrapped: vllm_xargs of a beam search is dropped"}

CONTRACTS = by_hand(
    {
        "vllm.v1.engine.input_processor:InputProcessor": {
            "process_inputs": "wrapped: every front end makes its requests with it",
        },
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": {
            **_PLACE,
            **_BEAM_SEARCH,
        },
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest": {
            **_PLACE,
            **_BEAM_SEARCH,
        },
        "vllm.entrypoints.openai.responses.protocol:ResponsesRequest": _PLACE,
        "vllm.entrypoints.anthropic.serving:AnthropicServingMessages": {
            "create_messages(request, raw_request)": _HANDLER,
        },
        "vllm.entrypoints.generate.generative_scoring.serving:ServingGenerativeScoring": {
            "create_generative_scoring(request, raw_request)": _HANDLER,
        },
        "vllm.entrypoints.generate.structured_decisions.serving:ServingStructuredDecisions": {
            "create_decision(request, raw_request)": _HANDLER,
        },
        "vllm.entrypoints.scale_out.render.serving:ServingRender": {
            "render_messages_request(request, raw_request)": _HANDLER,
        },
        "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens": {
            "serve_tokens(request, raw_request)": _HANDLER,
        },
        "vllm.v1.metrics.loggers:StatLoggerManager": {
            "__init__(vllm_config)": "wrapped: adds our logger",
            "stat_loggers: list[AggregateStatLoggerBase]": "ours becomes the first",
        },
        "vllm.v1.metrics.stats:SchedulerStats": {
            "num_kv_fetch_reqs_by_stage: dict[str, int]": (
                "carries our report as a stage of that name, which vLLM's loggers pass over"
            ),
        },
    }
)
