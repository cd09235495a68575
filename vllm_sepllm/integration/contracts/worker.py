"""Names of workers that types do not show, or that we write; and flags of wrapped backends."""

from collections.abc import Iterator

from vllm_sepllm.integration.contracts.contract import Contract, by_hand
from vllm_sepllm.integration.contracts.source_tree import SourceTree, members

_CPU = "vllm.v1.attention.backends.cpu_attn:CPUAttention"
# wire/backend_name.py, WRAPPED_BACKENDS
_GPU = (
    "vllm.v1.attention.backends.flash_attn:FlashAttention",
    "vllm.v1.attention.backends.flashinfer:FlashInfer",
    "vllm.v1.attention.backends.triton_attn:TritonAttention",
)
_BACKENDS = [f"{family}Backend" for family in (_CPU, *_GPU)]
_BUILDERS = [f"{family}MetadataBuilder" for family in (_CPU, *_GPU)]
_IMPLS = [f"{family}Impl" for family in _GPU]
WRAPPED = (*_BACKENDS, *_BUILDERS, f"{_CPU}BackendImpl", *_IMPLS)

# decided flags: a new one may have vLLM do to our layers what only the wrapped backend can do
FLAGS = (
    # asked before a layer is ours, while vLLM chooses its backend
    *("supports_alibi_sqrt", "supports_attn_type", "supports_batch_invariance"),
    *("supports_block_size", "supports_combination", "supports_compute_capability"),
    *("supports_dtype", "supports_head_size", "supports_kv_cache_dtype", "supports_kv_connector"),
    *("supports_mm_prefix", "supports_non_causal", "supports_per_head_quant_scales"),
    *("supports_rswa", "supports_sink", "supports_sliding_window"),
    # of what startup/refusals.py refuses: context parallelism and MLA
    *("supports_dcp", "supports_pcp", "supports_non_causal_dcp", "supports_dense_mha_prefill"),
    "supports_mtp_with_cp_non_trivial_interleave_size",
    # ours say False
    *("supports_quant_query_input", "supports_update_block_table"),
    # of the rows that the wrapped backend serves, or of a draft model's layers, which stay its own
    *("supports_device_cpu_query_lens_mismatch", "supports_draft_decode_metadata_update"),
    "supports_xqa_or_trtllm_gen_decode",
)

# decided too, and not in the oldest vLLM of our range; ours say False
NEWER_FLAGS = ("supports_kv_cache_update_bypass",)


def new_flags(tree: SourceTree) -> Iterator[str]:
    """Flags of WRAPPED classes that nobody has decided."""
    lineages = [found for owner in WRAPPED for found in tree.lineage(*owner.split(":"))]
    flags = {(found.where, name) for found in lineages for name in members(found.node)}
    for where, name in sorted(flags):
        if name.startswith("supports_") and name not in (*FLAGS, *NEWER_FLAGS):
            yield f"{where}.{name}: new, what do our layers answer?"


_BACKEND = {"get_builder_cls()": "called: the one to wrap"}
_IMPL = {
    "num_heads, num_kv_heads, head_size, scale, kv_cache_dtype": "read of the wrapped one",
    "alibi_slopes, logits_soft_cap, sinks": "read of the wrapped one",
}
_GPU_IMPL = {
    **_IMPL,
    "do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)": "called: skips slot -1",
}
_BUILDER = {
    "build(common_prefix_len, common_attn_metadata)": "called for the wrapped backend's rows",
}
_UNTYPED = "read; torch's __getattr__ answers to every name of a module, so types tell nothing"

CONTRACTS = by_hand(
    {
        **dict.fromkeys(_BACKENDS, _BACKEND),
        **dict.fromkeys(_BUILDERS, _BUILDER),
        "vllm.v1.attention.backends.flashinfer:FlashInferMetadataBuilder": {
            **_BUILDER,
            "enable_cuda_graph": "switched off for decodes cut off a mixed batch",
        },
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder": {
            **_BUILDER,
            "max_num_splits: int": "0 for decodes cut off a mixed batch",
        },
        **dict.fromkeys(_IMPLS, _GPU_IMPL),
        f"{_CPU}BackendImpl": _IMPL,
        "vllm.v1.attention.backend:CommonAttentionMetadata": {
            "seq_lens, max_seq_len, max_query_len, seq_lens_cpu_upper_bound, slot_mapping": (
                "replaced for the wrapped backend's rows"
            ),
        },
        "vllm.v1.attention.backend:AttentionLayer": {"_q_scale": _UNTYPED},
        "vllm.model_executor.layers.attention.attention:Attention": {
            "attn_type, sliding_window, kv_sharing_target_layer_name, query_quant": _UNTYPED,
            "num_heads, num_kv_heads, head_size, head_size_v, dtype": _UNTYPED,
            "kv_cache, kv_cache_dtype, kv_cache_torch_dtype": _UNTYPED,
            "attn_backend, impl": "replaced in layers that become ours",
        },
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase": {
            "_compute_cos_sin_cache()": "called: the model's angles in float32",
            "is_neox_style": _UNTYPED,
        },
        "vllm.platforms.interface:Platform": {"fp8_dtype": "called: how fp8 caches are read"},
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner": {
            "kv_caches": "read: blocks of each layer, which host memory holds copies of",
            "execute_model(scheduler_output, intermediate_tensors)": (
                "wrapped: hands on the plan; the worker and the Ray executor call it"
            ),
            "_model_forward(input_ids, positions)": (
                "wrapped on CPUs: shifts positions that are renumbered"
            ),
            "query_start_loc": "read: the tokens of each row",
            "sample_tokens(grammar_output)": "wrapped on CPUs: keeps seeds of chunks",
            "discard_request_mask": "read: rows whose prompt goes on",
            "profile_run()": "wrapped: memory of a step that it does not use is held beside it",
            "reorder_batch_threshold: int | None": "set: all pipeline stages sort alike",
            "input_batch": "read: which request is in which row",
        },
        "vllm.v1.worker.gpu_input_batch:InputBatch": {
            "req_ids, num_reqs": "read: the rows' requests",
            "generators: dict[int, torch.Generator]": "emptied of chunks while vLLM samples",
        },
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner": {
            "kv_caches": "read: blocks of each layer, which host memory holds copies of",
            "execute_model(scheduler_output, intermediate_tensors, dummy_run)": (
                "wrapped: hands on the plan, except to steps that vLLM makes up"
            ),
            "profile_run()": "wrapped: memory of a step that it does not use is held beside it",
            "attn_groups, req_states, speculator": "read; vLLM types it as the other runner",
            "model, device": "run twice at start-up: do keys turn with positions",
            "model_state": "gets positions that are renumbered",
            "input_buffers": "read: the size of positions",
        },
        "vllm.v1.worker.gpu.input_batch:InputBuffers": {"positions": "read: the size of ours"},
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState": {
            "prepare_inputs(input_batch, req_states)": "wrapped: hands on renumbered positions",
            "prepare_dummy_inputs(num_reqs, num_tokens)": "wrapped: those that a graph captures",
        },
        "vllm.v1.worker.gpu.states:RequestState": {"index_to_req_id": "read: the rows' requests"},
    }
) + tuple(
    Contract(
        f"{runner}:copy_kv_cache_blocks_inplace",
        "wrapped: makes the copies of a step in parts",
        passed=("kv_caches", "num_blocks", "kv_cache_block_copies"),
    )
    for runner in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
)
