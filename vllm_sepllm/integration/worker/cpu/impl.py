"""One attention layer: vLLM's CPU kernel for decode, query tiles for prefill."""

import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_sepllm.integration.worker.cpu.kv_layout import CPUCacheLayout, split_cache
from vllm_sepllm.integration.worker.cpu.masked_tiles import TileAttention
from vllm_sepllm.integration.worker.cpu.metadata import (
    CheckpointWrites,
    ChunkRows,
    LibraryRows,
    PrefillRows,
    SepLLMCPUMetadata,
)


class SepLLMCPUImpl(AttentionImpl[SepLLMCPUMetadata]):
    """Wraps the implementation that vLLM chose for the layer."""

    def __init__(self, wrapped: CPUAttentionBackendImpl) -> None:
        self.wrapped = wrapped
        self.num_heads = wrapped.num_heads
        self.num_kv_heads = wrapped.num_kv_heads
        self.head_size = wrapped.head_size
        self.scale = wrapped.scale
        self.kv_cache_dtype = wrapped.kv_cache_dtype
        self.logits_soft_cap = wrapped.logits_soft_cap
        self._sinks = wrapped.sinks
        if self._sinks is not None and self._sinks.dtype != torch.bfloat16:
            self._sinks = self._sinks.float()  # vLLM's kernel takes these two dtypes
        self._attend = TileAttention(wrapped.scale, wrapped.logits_soft_cap, wrapped.sinks)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SepLLMCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See vLLM's AttentionImpl.forward; writes ``output`` and the cache."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sepllm does not support fused output quantization on CPU")
        if attn_metadata is None:  # the model runs without requests
            return output
        if attn_metadata.checkpoints is not None:
            self._checkpoints(layer, key, value, kv_cache, attn_metadata.checkpoints)
        if attn_metadata.library is not None:
            self._library(layer, query, key, value, kv_cache, attn_metadata.library, output)
        if attn_metadata.prefill is not None:
            self._prefill(layer, query, key, value, kv_cache, attn_metadata.prefill, output)
        return output

    def _checkpoints(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        writes: CheckpointWrites,
    ) -> None:
        if writes.copies is not None:
            writes.copies.run(kv_cache)
        if len(writes.tokens):
            tokens = writes.tokens
            self._write(layer, key[tokens], value[tokens], kv_cache, writes.slots)

    def _library(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: LibraryRows,
        output: torch.Tensor,
    ) -> None:
        if rows.spills is not None:
            rows.spills.run(kv_cache)
        select = slice(rows.num_tokens) if rows.tokens is None else rows.tokens
        self._write(layer, key[select], value[select], kv_cache, rows.slots)
        attended = output[select]  # a view of the first rows, a copy of scattered ones
        self.wrapped.forward(layer, query[select], key, value, kv_cache, rows.metadata, attended)
        if rows.tokens is not None:
            output[rows.tokens] = attended

    def _prefill(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: PrefillRows,
        output: torch.Tensor,
    ) -> None:
        for chunk in rows.chunks:
            if chunk.sequences is not None:
                own = slice(chunk.first, chunk.last)
                chunk.sequences.attend(
                    query[own],
                    key[own],
                    value[own],
                    self._cached(chunk, kv_cache, rows.layout),
                    self.scale,
                    self._sinks,
                    output[own],
                )
                continue
            keys, values = self._chunk_keys(chunk, key, value, kv_cache, rows.layout)
            for tile in chunk.tiles:
                queries = slice(chunk.first + tile.first, chunk.first + tile.last)
                output[queries] = self._attend(
                    query[queries],
                    keys.index_select(1, tile.keys),
                    values.index_select(1, tile.keys),
                    tile.mask(rows.zeros),
                )
                tile.clear(rows.zeros)
        if rows.copies is not None:
            rows.copies.run(kv_cache)
        self._write(layer, key[rows.tokens], value[rows.tokens], kv_cache, rows.slots)

    def _chunk_keys(
        self,
        chunk: ChunkRows,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: CPUCacheLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a chunk, [num_kv_heads, num_cached + chunk, head_size], cache first."""
        keys = key[chunk.first : chunk.last].transpose(0, 1)
        values = value[chunk.first : chunk.last].transpose(0, 1)
        cached = self._cached(chunk, kv_cache, layout)
        if cached is None:
            return keys, values
        cached_keys, cached_values = cached.chunk(2, dim=2)
        return torch.cat([cached_keys, keys], 1), torch.cat([cached_values, values], 1)

    def _cached(
        self, chunk: ChunkRows, kv_cache: torch.Tensor, layout: CPUCacheLayout
    ) -> torch.Tensor | None:
        """[num_kv_heads, num_cached, 2 * head_size]; None if the cache is empty."""
        if chunk.num_cached == 0:
            return None
        return layout.gather(kv_cache, chunk.block_ids)[:, : chunk.num_cached]

    def _write(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        vllm_ops.cpu_attn_reshape_and_cache(
            key,
            value,
            *split_cache(kv_cache),
            slots,
            layer.isa,  # type: ignore[attr-defined]
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
