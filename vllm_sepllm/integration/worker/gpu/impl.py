"""Prefill attention of one layer on a GPU."""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sepllm import ops
from vllm_sepllm.integration.worker.impl import SepLLMImpl, SlotMoves


class SepLLMGPUImpl(SepLLMImpl[ops.PrefillMetadata]):
    """Our kernel over the paged cache."""

    # vLLM would hand over queries in fp8; our kernel multiplies in the model's dtype, so the
    # wrapped backend's are quantised here
    supports_quant_query_input = False

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        # None and 0 both stand for no cap, backend by backend
        self._logits = ops.Logits(wrapped.scale, wrapped.logits_soft_cap or 0.0, wrapped.sinks)
        self._is_fp8 = is_quantized_kv_cache(self.kv_cache_dtype)
        self._caches: ops.CacheTable | None = None

    def bind(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's cache, [num_blocks, num_kv_heads, block_size, 2 * head_size]."""
        self._caches = ops.CacheTable.build([kv_cache])

    def release(self) -> None:
        """Let go of the cache."""
        self._caches = None

    def library_query(self, layer: AttentionLayer, query: torch.Tensor) -> torch.Tensor:
        """See the base class; fp8 where the layer quantises."""
        if layer.query_quant is None:  # type: ignore[attr-defined]
            return query
        flat, _ = layer.query_quant(query.flatten(1), layer._q_scale)  # type: ignore[attr-defined]
        quantised: torch.Tensor = flat.view(query.shape)
        return quantised

    def move(self, kv_cache: torch.Tensor, moves: SlotMoves) -> None:
        """See the base class."""
        assert self._caches is not None, "the worker binds the caches before any step"
        ops.spill(self._caches, moves.source, moves.target)

    def prefill(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: ops.PrefillMetadata,
        output: torch.Tensor,
    ) -> None:
        """See the base class; one launch."""
        keys, values = kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]
        scales = None
        if self._is_fp8:
            fp8 = current_platform.fp8_dtype()
            keys, values = keys.view(fp8), values.view(fp8)
            scales = (layer._k_scale, layer._v_scale)
        cache = ops.PagedCache(keys, values, scales)
        ops.prefill(query, key, value, cache, rows, self._logits, output)
