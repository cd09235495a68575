"""One attention layer: the wrapped backend for decode, our kernel for prefill."""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionImplBase, AttentionLayer
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sepllm import ops
from vllm_sepllm.integration.worker.gpu.metadata import PrefillRows, SepLLMGPUMetadata


class SepLLMGPUImpl(AttentionImpl[SepLLMGPUMetadata]):
    """Wraps the implementation that vLLM chose for the layer."""

    # vLLM would hand over queries in fp8; our kernel multiplies in the model's dtype, so the
    # wrapped backend's are quantised here
    supports_quant_query_input = False

    def __init__(self, wrapped: Any) -> None:
        """``wrapped`` is the layer's AttentionImpl, of a backend in WRAPPED_BACKENDS."""
        self.wrapped = wrapped
        self.num_heads = wrapped.num_heads
        self.num_kv_heads = wrapped.num_kv_heads
        self.head_size = wrapped.head_size
        self.scale = wrapped.scale
        self.kv_cache_dtype = wrapped.kv_cache_dtype
        self.alibi_slopes = wrapped.alibi_slopes
        # None and 0 both stand for no cap, backend by backend
        self._logits = ops.Logits(wrapped.scale, wrapped.logits_soft_cap or 0.0, wrapped.sinks)
        self._is_fp8 = is_quantized_kv_cache(self.kv_cache_dtype)
        self._spills: ops.SpillTable | None = None

    def bind(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's cache, [num_blocks, num_kv_heads, block_size, 2 * head_size]."""
        self._spills = ops.SpillTable.build([kv_cache])

    def get_impl_variants(self) -> tuple[AttentionImplBase[Any], ...]:
        """The wrapped implementation: builders look for their own kind to learn what layers do."""
        variants: tuple[AttentionImplBase[Any], ...] = self.wrapped.get_impl_variants()
        return variants

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Weights were loaded anew: the wrapped implementation may keep some of them."""
        self.wrapped.process_weights_after_loading(act_dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SepLLMGPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See vLLM's AttentionImpl.forward; writes ``output`` and the cache."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "sepllm does not support fused output quantization: set "
                'compilation_config={"pass_config": {"fuse_attn_quant": false}}'
            )
        if attn_metadata is None:  # memory profiling, before there is a cache
            return output.fill_(0)
        step = attn_metadata
        if step.prefill is not None:
            self.prefill(layer, query, key, value, kv_cache, step.prefill, output)
        if step.checkpoint is not None:
            tokens, slots = step.checkpoint.tokens, step.checkpoint.slots
            self.wrapped.do_kv_cache_update(layer, key[tokens], value[tokens], kv_cache, slots)
        # after the prefill rows have read their rings; the library's rows belong to others
        self.wrapped.do_kv_cache_update(layer, key, value, kv_cache, step.slots)
        if step.library is not None:
            first = slice(step.library.num_tokens)
            queries = query[first]
            if layer.query_quant is not None:  # type: ignore[attr-defined]
                queries = self._quantised(layer, queries)
            self.wrapped.forward(
                layer, queries, key[first], value[first], kv_cache, step.library.metadata,
                output[first],
            )  # fmt: skip
        return output

    def _quantised(self, layer: AttentionLayer, query: torch.Tensor) -> torch.Tensor:
        flat, _ = layer.query_quant(query.flatten(1), layer._q_scale)  # type: ignore[attr-defined]
        quantised: torch.Tensor = flat.view(query.shape)
        return quantised

    def prefill(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: PrefillRows,
        output: torch.Tensor,
    ) -> None:
        """The chunks of a step: attention, then the copies that make room for their survivors."""
        keys, values = kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]
        scales = None
        if self._is_fp8:
            fp8 = current_platform.fp8_dtype()
            keys, values = keys.view(fp8), values.view(fp8)
            scales = (layer._k_scale, layer._v_scale)
        cache = ops.PagedCache(keys, values, rows.block_table, scales)
        ops.prefill(query, key, value, cache, rows.metadata, self._logits, output)
        if rows.moves is not None:
            assert self._spills is not None, "the worker binds the caches before any step"
            ops.spill(self._spills, rows.moves.source, rows.moves.target)
