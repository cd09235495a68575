"""vLLM names that a request's own policy relies on (see contracts.py)."""

from vllm_sepllm.integration.contracts.contract import Contract, fields

_CORE_REQUEST = "vllm.v1.engine:EngineCoreRequest"
_OPENAI = "vllm.entrypoints.openai"
_PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"
_REQUEST = "vllm.v1.request:Request"
_SAMPLING = "vllm.sampling_params:SamplingParams"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

REQUESTS = (
    Contract(
        f"{_PROCESSOR}.process_inputs",
        "wrapped: every front end makes its requests with it; a VLLMClientError is HTTP 400",
        (
            *("request_id", "prompt", "params", "supported_tasks", "arrival_time"),
            *("lora_request", "tokenization_kwargs", "trace_headers", "priority"),
            *("data_parallel_rank", "resumable", "session_id", "kv_hints"),
        ),
    ),
    *fields(_PROCESSOR, "read: is sepllm selected?", "vllm_config"),
    *fields(_CORE_REQUEST, "read", "prompt_token_ids", "sampling_params", "resumable"),
    *fields(_SAMPLING, "read: carries what a request chooses", "extra_args", "max_tokens"),
    Contract("vllm.exceptions:VLLMClientError", "raised: vLLM's server makes HTTP 400 of it", None),
    *fields("vllm.config.cache:CacheConfig", "read: told by the engine core", "num_gpu_blocks"),
    *fields("vllm.config.model:ModelConfig", "read: kinds of layers", "hf_text_config"),
    Contract(
        f"{_SCHEDULER}.add_request",
        "overridden: takes a request's choice or refuses it",
        ("request",),
    ),
    Contract(
        f"{_SCHEDULER}._handle_blocked_waiting_request",
        "overridden: a refused request is never scheduled",
        ("request",),
    ),
    Contract(
        f"{_SCHEDULER}.grammar_compile_error_reqs",
        "written: vLLM ends these waiting requests with an error after the step",
    ),
    *fields(_SCHEDULER, "read", "max_model_len"),
    *fields(_REQUEST, "written: keeps layers of other kinds apart", "cache_salt"),
    *fields(_REQUEST, "read", "sampling_params"),
    Contract(f"{_REQUEST}.update_block_hashes", "called: once more, with our cache_salt", ()),
    Contract(
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
        "wrapped: model_extra of a body is dropped",
        ("max_tokens", "default_sampling_params"),
    ),
    Contract(
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionRequest.to_beam_search_params",
        "wrapped: vllm_xargs of a beam search are dropped",
        ("max_tokens", "default_sampling_params"),
    ),
    Contract(
        f"{_OPENAI}.completion.protocol:CompletionRequest.to_sampling_params",
        "wrapped: model_extra of a body is dropped",
        ("max_tokens", "default_sampling_params"),
    ),
    Contract(
        f"{_OPENAI}.completion.protocol:CompletionRequest.to_beam_search_params",
        "wrapped: vllm_xargs of a beam search are dropped",
        ("max_tokens", "default_sampling_params"),
    ),
    Contract(
        f"{_OPENAI}.responses.protocol:ResponsesRequest.to_sampling_params",
        "wrapped: model_extra of a body is dropped",
        ("default_max_tokens", "default_sampling_params"),
    ),
)
