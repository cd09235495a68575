"""Every vLLM name that we override, wrap or lean on and that vLLM does not promise to keep.

``CONTRACTS`` is checked by tests/integration/contracts/test_contracts.py: after an upgrade of vLLM
that test names what moved before any model is loaded. An entry goes with the last use of its name.
"""

from vllm_sepllm.integration.contracts.caching import CACHING
from vllm_sepllm.integration.contracts.contract import Contract, fields
from vllm_sepllm.integration.contracts.cpu import CPU
from vllm_sepllm.integration.contracts.gpu import GPU
from vllm_sepllm.integration.contracts.metrics import METRICS
from vllm_sepllm.integration.contracts.requests import REQUESTS
from vllm_sepllm.integration.contracts.trained import TRAINED

_CONFIG = "vllm.config"
_CACHE_CONFIG = f"{_CONFIG}.cache:CacheConfig"
_MODEL_CONFIG = f"{_CONFIG}.model:ModelConfig"
_PARALLEL_CONFIG = f"{_CONFIG}.parallel:ParallelConfig"
_SCHEDULER_CONFIG = f"{_CONFIG}.scheduler:SchedulerConfig"
_VLLM_CONFIG = f"{_CONFIG}.vllm:VllmConfig"
_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
_REGISTRY = "vllm.v1.attention.backends.registry"

SELECTION = (
    Contract(
        f"{_ENGINE_ARGS}.create_engine_config",
        "wrapped: every way to start an engine passes it",
        ("usage_context", "headless"),
    ),
    *fields(
        _ENGINE_ARGS,
        "hidden from vLLM during create_engine_config, then put back",
        *("attention_backend", "attention_config", "block_size"),
    ),
    *fields(_ENGINE_ARGS, "refused if set", "scheduler_cls", "worker_cls"),
    *fields(_ENGINE_ARGS, "holds our configuration", "additional_config"),
    Contract(
        f"{_CONFIG}.attention:AttentionConfig.validate_backend_before",
        "called: turns what the user wrote into a member of AttentionBackendEnum",
        ("value",),
    ),
    *fields(f"{_CONFIG}.attention:AttentionConfig", "read", "backend", "backend_per_kind"),
    Contract(
        f"{_REGISTRY}:register_backend",
        "called with a new name",
        ("backend", "class_path", "is_mamba"),
    ),
    Contract(f"{_REGISTRY}:AttentionBackendEnum.__members__", "read: is our name there?"),
    *fields("vllm.platforms.interface:Platform", "read", "is_cpu", "device_name"),
    Contract(
        "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        "wrapped: it ignores the backend's name; the first argument is ours",
        ("selected_backend", "attn_selector_config", "num_heads"),
    ),
    Contract("vllm.plugins:load_general_plugins", "called by the doctor, as vLLM starts", ()),
    Contract("vllm.logger:init_logger", "called: a logger whose lines users see", ("name",)),
    Contract(
        "vllm.tokenizers:cached_tokenizer_from_config",
        "called: separators are read from it; None with skip_tokenizer_init",
        ("model_config", "kwargs"),
    ),
    *fields(_VLLM_CONFIG, "read and written", "additional_config"),
    *fields(_SCHEDULER_CONFIG, "read and written", "scheduler_cls", "async_scheduling"),
    *fields(_SCHEDULER_CONFIG, "switched back off", "disable_hybrid_kv_cache_manager"),
    *fields(_PARALLEL_CONFIG, "read and written", "worker_cls", "pipeline_parallel_size"),
    *fields(_CACHE_CONFIG, "read", "block_size"),
    *fields(_MODEL_CONFIG, "read", "max_model_len", "hf_config"),
    Contract(f"{_MODEL_CONFIG}.get_vocab_size", "called: bound of token ids", ()),
    Contract(f"{_MODEL_CONFIG}.get_total_num_hidden_layers", "called: range of full_layers", ()),
)

REFUSALS = (
    *fields(
        _MODEL_CONFIG,
        "refused if on",
        *("runner_type", "is_encoder_decoder", "use_mla", "is_hybrid", "is_attention_free"),
        *("is_mm_prefix_lm", "rswa_window", "enable_prompt_embeds", "dtype", "multimodal_config"),
    ),
    *fields(f"{_CONFIG}.multimodal:MultiModalConfig", "not refused if on", "language_model_only"),
    *fields(
        _VLLM_CONFIG,
        "refused if on",
        *("diffusion_config", "speculative_config", "kv_transfer_config", "use_v2_model_runner"),
        "kv_events_config",
    ),
    *fields(
        _PARALLEL_CONFIG,
        "refused if on",
        *("decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching"),
    ),
    *fields(_CACHE_CONFIG, "refused if on", "kv_sharing_fast_prefill", "cache_dtype"),
    *fields(f"{_CONFIG}.aux_output:AuxOutputConfig", "refused if on", "enabled"),
    Contract("vllm.v1.kv_cache_interface:is_quantized_kv_cache", "called", ("kv_cache_dtype",)),
    Contract(
        "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype",
        "called",
        ("kv_cache_dtype", "model_config"),
    ),
)

_ATTENTION = "vllm.model_executor.layers.attention.attention:Attention"

LAYERS = (
    Contract(
        "vllm.config:get_layers_from_vllm_config",
        "called: the attention layers of the loaded model by name",
        ("vllm_config", "layer_type", "layer_names"),
    ),
    Contract(
        "vllm.model_executor.models.utils:extract_layer_index",
        "called: which layer full_layers means",
        ("layer_name", "num_attn_module"),
    ),
    *fields(_ATTENTION, "replaced in layers that become ours", "attn_backend", "impl"),
    *fields(
        _ATTENTION,
        "read: which layers can become ours",
        *("attn_type", "sliding_window", "kv_sharing_target_layer_name"),
        *("head_size", "head_size_v", "dtype", "kv_cache_torch_dtype"),
    ),
)

_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_SPEC = "vllm.v1.kv_cache_interface"
_SPEC_REGISTRY = "vllm.v1.kv_cache_spec_registry"

CACHE = (
    Contract(
        f"{_SPEC_REGISTRY}:KVCacheSpecRegistry.check_kv_cache_spec_registry",
        "called: makes vLLM register its own specs before ours",
        ("kv_cache_spec",),
    ),
    Contract(
        f"{_SPEC_REGISTRY}:register_kv_cache_spec",
        "called: our spec and its manager",
        ("manager_class", "uniform_type_base_spec"),
    ),
    *fields(f"{_SPEC}:KVCacheSpec", "read", "block_size", "page_size_bytes"),
    Contract(
        f"{_SPEC}:KVCacheSpec.max_memory_usage_bytes",
        "overridden: the longest request by its compact length",
        ("vllm_config",),
    ),
    Contract("vllm.utils.math_utils:cdiv", "called", ("a", "b")),
    Contract(
        f"{_MANAGER}.get_num_blocks_to_allocate",
        "overridden: counts compact entries",
        (
            *("request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens"),
            *("num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap"),
            "prefill_end",
        ),
    ),
    Contract(
        f"{_MANAGER}.allocate_new_blocks",
        "overridden: counts compact entries",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Contract(
        f"{_MANAGER}.find_longest_cache_hit",
        "overridden: finds a checkpoint",
        (
            *("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"),
            *("drop_eagle_block", "alignment_tokens", "dcp_world_size", "pcp_world_size"),
        ),
    ),
    *fields(_MANAGER, "read", "req_to_blocks", "block_size"),
    *fields(_SCHEDULER, "read", "requests", "vllm_config", "kv_cache_manager"),
    Contract("vllm.v1.core.kv_cache_manager:KVCacheManager.coordinator", "read"),
    Contract(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.single_type_managers",
        "read: ours learn the requests' tokens",
    ),
    Contract(
        f"{_SCHEDULER}._update_after_schedule",
        "overridden: attaches the plan before num_computed_tokens moves",
        ("scheduler_output",),
    ),
    Contract(
        f"{_SCHEDULER}._update_request_as_session",
        "overridden: a streaming session drops its last token",
        ("session", "update"),
    ),
    Contract(
        f"{_SCHEDULER}._free_blocks",
        "overridden: forgets the request",
        ("request",),
    ),
    *fields(
        "vllm.v1.request:Request",
        "read: what the plan is made of",
        *("request_id", "num_computed_tokens", "_all_token_ids"),
    ),
    *fields(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "read; carries the plan as an attribute of ours",
        *("num_scheduled_tokens", "total_num_scheduled_tokens"),
    ),
)

_BACKEND = "vllm.v1.attention.backend"

ATTENTION = (
    Contract(f"{_BACKEND}:AttentionBackend.get_name", "overridden", ()),
    Contract(f"{_BACKEND}:AttentionBackend.get_impl_cls", "overridden", ()),
    Contract(f"{_BACKEND}:AttentionBackend.get_builder_cls", "overridden", ()),
    Contract(
        f"{_BACKEND}:AttentionBackend.customize_spec",
        "overridden: both model runners ask it for every layer's spec",
        ("spec",),
    ),
    Contract(
        f"{_BACKEND}:AttentionBackend.forward_includes_kv_cache_update",
        "overridden: we write what is kept, after attending",
    ),
    Contract(
        f"{_BACKEND}:AttentionImpl.forward",
        "overridden",
        (
            *("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            *("output_scale", "output_block_scale"),
        ),
    ),
    *fields(f"{_BACKEND}:AttentionLayer", "read", "_k_scale_float", "_v_scale_float"),
    Contract(f"{_BACKEND}:AttentionMetadataBuilder.reorder_batch_threshold", "overridden"),
    *fields(
        f"{_BACKEND}:CommonAttentionMetadata",
        "read, and replaced for the rows of vLLM's kernel",
        *("num_reqs", "num_actual_tokens", "query_start_loc", "query_start_loc_cpu", "seq_lens"),
        *("max_seq_len", "max_query_len", "block_table_tensor", "slot_mapping"),
    ),
)

CONTRACTS = (
    *SELECTION,
    *TRAINED,
    *REFUSALS,
    *LAYERS,
    *CACHE,
    *CACHING,
    *REQUESTS,
    *ATTENTION,
    *CPU,
    *GPU,
    *METRICS,
)
