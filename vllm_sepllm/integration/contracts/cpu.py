"""vLLM names that the CPU path relies on (see contracts.py)."""

from vllm_sepllm.integration.contracts.contract import Contract, fields

_CPU = "vllm.v1.attention.backends.cpu_attn"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

CPU = (
    Contract(f"{_CPU}:CPUAttentionBackend.get_name", "overridden", ()),
    Contract(f"{_CPU}:CPUAttentionBackend.get_impl_cls", "overridden", ()),
    Contract(f"{_CPU}:CPUAttentionBackend.get_builder_cls", "overridden", ()),
    Contract(f"{_CPU}:CPUAttentionBackend.forward_includes_kv_cache_update", "overridden"),
    Contract(
        f"{_CPU}:CPUAttentionMetadataBuilder.build",
        "overridden, and called for the rows of vLLM's kernel",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Contract(
        f"{_CPU}:CPUAttentionMetadataBuilder._set_isa_to_layers",
        "vLLM calls it: gives each layer the isa that our implementation reads",
        ("layer_names",),
    ),
    *fields(
        f"{_CPU}:CPUAttentionMetadataBuilder",
        "read",
        *("kv_cache_spec", "num_kv_heads", "head_dim", "block_size", "isa", "dtype"),
    ),
    Contract(
        f"{_CPU}:CPUAttentionBackendImpl.forward",
        "called for the rows of vLLM's kernel",
        (
            *("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            *("output_scale", "output_block_scale"),
        ),
    ),
    *fields(
        f"{_CPU}:CPUAttentionBackendImpl",
        "read: what a layer adds to softmax attention",
        *("num_heads", "num_kv_heads", "head_size", "scale", "kv_cache_dtype"),
        *("logits_soft_cap", "sinks", "alibi_slopes"),
    ),
    Contract(
        "vllm._custom_ops:cpu_attn_reshape_and_cache",
        "called: writes KV, and shows us the cache's element order",
        (
            *("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
            *("k_scale", "v_scale", "kv_cache_dtype"),
        ),
    ),
    Contract(
        "vllm._custom_ops:cpu_attn_get_scheduler_metadata",
        "called: prefill chunks as sequences",
        (
            *("num_reqs", "num_heads", "num_kv_heads", "head_dim", "seq_lens", "dtype"),
            *("query_start_loc", "causal", "sliding_window_size", "isa", "enable_kv_split"),
            *("dynamic_causal", "kv_cache_dtype"),
        ),
    ),
    Contract(
        "vllm._custom_ops:cpu_attention_with_kv_cache",
        "called: prefill chunks as sequences; causal, with a window that counts the query",
        (
            *("query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens"),
            *("scale", "causal", "alibi_slopes", "sliding_window", "block_table", "softcap"),
            *("scheduler_metadata", "s_aux", "dynamic_causal", "k_scale", "v_scale"),
            "kv_cache_dtype",
        ),
    ),
    Contract(f"{_WORKER}.load_model", "overridden: wraps layers", ("load_dummy_weights",)),
    Contract(
        f"{_WORKER}.initialize_from_config", "overridden: binds builders", ("kv_cache_config",)
    ),
    Contract(
        f"{_RUNNER}.execute_model",
        "wrapped: hands on the plan; the worker and the Ray executor call it",
        ("scheduler_output", "intermediate_tensors"),
    ),
    *fields("vllm.v1.worker.worker_base:WorkerBase", "read", "vllm_config"),
    *fields("vllm.v1.worker.cpu_worker:CPUWorker", "read", "model_runner"),
    *fields(_RUNNER, "read: which request is in which row, and our builders", "attn_groups"),
    *fields(_RUNNER, "read: which request is in which row, and our builders", "input_batch"),
    *fields(_RUNNER, "set: all pipeline stages sort alike", "reorder_batch_threshold"),
    Contract("vllm.v1.worker.gpu_input_batch:InputBatch.req_ids", "read"),
    Contract("vllm.v1.worker.utils:AttentionGroup.metadata_builders", "read"),
)
