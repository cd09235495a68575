"""Prefill attention of one layer on the CPU."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from vllm_sepllm.integration.worker.cpu.kv_layout import CPUCacheLayout, copy_elements
from vllm_sepllm.integration.worker.cpu.masked_tiles import TileAttention, TileTensors
from vllm_sepllm.integration.worker.cpu.sequences import ChunkSequences
from vllm_sepllm.integration.worker.impl import SepLLMImpl, SlotMoves


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A prefill chunk of one request.

    Attributes:
        first: its first row in the batch.
        last: end of its rows, exclusive.
        block_ids: [num_blocks] int64 that hold its cache as the step begins.
        num_cached: entries in them.
        sequences: what vLLM's kernel attends to; None: it cannot.
        tiles: queries and the keys that they read, where there are no sequences.
    """

    first: int
    last: int
    block_ids: torch.Tensor
    num_cached: int
    sequences: ChunkSequences | None
    tiles: list[TileTensors]


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """All prefill chunks of the step.

    Attributes:
        layout: of the cache that the chunks read.
        chunks: each attends on its own.
    """

    layout: CPUCacheLayout
    chunks: list[ChunkRows]


class SepLLMCPUImpl(SepLLMImpl[PrefillRows]):
    """vLLM's CPU kernel over sequences where it can, masked tiles elsewhere."""

    def __init__(self, wrapped: CPUAttentionBackendImpl) -> None:
        super().__init__(wrapped)
        self.logits_soft_cap = wrapped.logits_soft_cap
        self._sinks = wrapped.sinks
        if self._sinks is not None and self._sinks.dtype != torch.bfloat16:
            self._sinks = self._sinks.float()  # vLLM's kernel takes these two dtypes
        self._attend = TileAttention(wrapped.scale, wrapped.logits_soft_cap, wrapped.sinks)

    def move(self, kv_cache: torch.Tensor, moves: SlotMoves) -> None:
        """See the base class."""
        copy_elements(kv_cache, moves.source, moves.target)

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
        """See the base class; chunk by chunk."""
        for chunk in rows.chunks:
            own = slice(chunk.first, chunk.last)
            cached = self._cached(chunk, kv_cache, rows.layout)
            part = (query[own], key[own], value[own], cached)
            if chunk.sequences is not None:
                chunk.sequences.attend(*part, self.scale, self._sinks, output[own])
            else:
                self._masked(*part, chunk.tiles, output[own])

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cached: torch.Tensor | None,
        tiles: list[TileTensors],
        output: torch.Tensor,
    ) -> None:
        # [num_kv_heads, num_cached + chunk, head_size], cache first
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        if cached is not None:
            cached_keys, cached_values = cached.chunk(2, dim=2)
            keys = torch.cat([cached_keys, keys], 1)
            values = torch.cat([cached_values, values], 1)
        for tile in tiles:
            queries = slice(tile.first, tile.last)
            output[queries] = self._attend(
                query[queries],
                keys.index_select(1, tile.keys),
                values.index_select(1, tile.keys),
                tile.mask(),
            )

    def _cached(
        self, chunk: ChunkRows, kv_cache: torch.Tensor, layout: CPUCacheLayout
    ) -> torch.Tensor | None:
        """[num_kv_heads, num_cached, 2 * head_size]; None if the cache is empty."""
        if chunk.num_cached == 0:
            return None
        return layout.gather(kv_cache, chunk.block_ids)[:, : chunk.num_cached]
