"""vLLM names that the GPU path relies on (see contracts.py)."""

from vllm_sepllm.integration.contracts.contract import Contract, fields

_BACKEND = "vllm.v1.attention.backend"
_BUILDER = f"{_BACKEND}:AttentionMetadataBuilder"
_COMMON = f"{_BACKEND}:CommonAttentionMetadata"
_SPEC = "vllm.v1.kv_cache_interface"
_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_IMPL = "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl"

GPU = (
    Contract(
        "vllm.v1.attention.ops.triton_unified_attention:unified_attention",
        "called by benchmarks alone: the full attention that they compare with",
        (
            *("q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k"),
            *("softmax_scale", "causal", "window_size", "block_table", "softcap", "q_descale"),
            *("k_descale", "v_descale", "seq_threshold_3D", "num_par_softmax_segments"),
            *("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum", "alibi_slopes"),
            *("output_scale", "qq_bias", "sinks", "mm_prefix_range", "rswa_prefix_lens"),
            *("rswa_window", "use_alibi_sqrt", "kv_quant_mode", "k_scale_cache", "v_scale_cache"),
            *("chunk_lookback", "use_td", "mm_prefix_clamp_sliding_window"),
        ),
    ),
    Contract(
        f"{_BUILDER}.build",
        "overridden, and called for the rows of the wrapped backend",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Contract(
        f"{_BUILDER}.build_for_cudagraph_capture",
        "overridden: what a graph captures is in buffers of ours",
        ("common_attn_metadata",),
    ),
    Contract(
        f"{_BUILDER}.get_cudagraph_support",
        "overridden: FULL graphs for decode alone",
        ("vllm_config", "kv_cache_spec"),
    ),
    *fields(
        f"{_BACKEND}:AttentionCGSupport", "returned, and compared", "UNIFORM_SINGLE_TOKEN_DECODE"
    ),
    Contract(
        f"{_COMMON}.unpadded",
        "called: the batch's first rows alone",
        ("num_actual_tokens", "num_actual_reqs"),
    ),
    Contract(f"{_COMMON}.replace", "called", ("kwargs",)),
    *fields(_COMMON, "read, and replaced", "req_idx", "seq_lens_cpu_upper_bound"),
    Contract(
        f"{_BACKEND}:AttentionImplBase.supports_quant_query_input",
        "overridden: our prefill kernel multiplies in the model's dtype",
    ),
    Contract(
        f"{_BACKEND}:AttentionImplBase.get_impl_variants",
        "overridden: builders look for their own implementation among the layers'",
        (),
    ),
    Contract(
        f"{_BUILDER}.supports_update_block_table", "overridden: no metadata serves two groups"
    ),
    *fields("vllm.v1.worker.utils:AttentionGroup", "read", "kv_cache_spec", "kernel_block_stride"),
    Contract(
        "vllm.v1.worker.block_table:get_block_table_width",
        "called: the width that kernels are compiled for",
        ("max_num_blocks", "block_size", "token_alignment"),
    ),
    Contract(
        f"{_BACKEND}:AttentionImplBase.process_weights_after_loading",
        "overridden: handed on to the wrapped implementation",
        ("act_dtype",),
    ),
    Contract(
        "vllm.config.compilation:CompilationConfig.max_cudagraph_capture_size",
        "read: buffers that a graph captures are no narrower",
    ),
    Contract(
        f"{_IMPL}.do_kv_cache_update",
        "called, of each wrapped backend: writes KV, skips slot -1",
        ("layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    *fields(
        _IMPL,
        "read, of each wrapped backend",
        *("num_heads", "num_kv_heads", "head_size", "scale", "kv_cache_dtype"),
        *("alibi_slopes", "logits_soft_cap", "sinks"),
    ),
    *fields(
        "vllm.model_executor.layers.attention.attention:Attention",
        "read",
        *("kv_cache", "query_quant", "kv_cache_dtype"),
    ),
    *fields(f"{_BACKEND}:AttentionLayer", "read", "_q_scale", "_k_scale", "_v_scale"),
    Contract("vllm.platforms.interface:Platform.fp8_dtype", "called: how fp8 caches are read", ()),
    Contract("vllm.platforms.interface:Platform.is_cuda_alike", "called", ()),
    Contract(
        "vllm.utils.torch_utils:async_tensor_h2d",
        "called: uploads without a host sync",
        ("data", "device", "dtype", "out"),
    ),
    Contract(
        f"{_SPEC}:KVCacheSpec.max_num_blocks_per_req",
        "overridden: room for staged tokens",
        ("vllm_config", "max_len"),
    ),
    Contract(
        f"{_SPEC}:AttentionSpec.max_num_blocks_per_req",
        "overridden: room for staged tokens",
        ("vllm_config", "max_len"),
    ),
    Contract(f"{_SPEC}:KVCacheSpec.uses_slot_mapping", "overridden: slots are ours"),
    *fields(_WORKER, "read: which runner it is", "use_v2_model_runner"),
    Contract(
        f"{_WORKER}.compile_or_warm_up_model",
        "overridden: vLLM's warm-up makes up steps that no scheduler planned",
        (),
    ),
    *fields(_RUNNER, "read", "req_states", "speculator"),
    Contract("vllm.v1.worker.gpu.states:RequestState.index_to_req_id", "read: whose row is which"),
    Contract(
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.draft_attn_layer_names",
        "read: they stay as they are",
    ),
    *fields("vllm.config.vllm:VllmConfig", "read", "num_speculative_tokens"),
    Contract(
        "vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
        "overridden: a session's blocks go while they are counted with the step in flight",
        ("request",),
    ),
    Contract(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.free",
        "called: an asynchronous streaming session begins anew",
        ("request",),
    ),
    Contract("vllm.config.speculative:SpeculativeConfig.method", "read: which drafters we know"),
    *fields("vllm.engine.arg_utils:EngineArgs", "read", "speculative_config"),
    *fields(
        "vllm.engine.arg_utils:EngineArgs",
        "switched off during create_engine_config for speculative decoding",
        "async_scheduling",
    ),
    *fields(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "read",
        *("scheduled_spec_decode_tokens", "scheduled_new_reqs", "scheduled_cached_reqs"),
    ),
    *fields("vllm.v1.core.sched.output:NewRequestData", "read", "req_id", "num_computed_tokens"),
    *fields(
        "vllm.v1.core.sched.output:CachedRequestData", "read", "req_ids", "num_computed_tokens"
    ),
)
