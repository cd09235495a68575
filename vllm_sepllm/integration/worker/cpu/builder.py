"""Slots, copies and prefill attention of a step on the CPU."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from vllm_sepllm.integration.worker.builder import BuilderMixin
from vllm_sepllm.integration.worker.cpu.impl import ChunkRows, PrefillRows
from vllm_sepllm.integration.worker.cpu.kv_layout import copy_elements, probe_layout
from vllm_sepllm.integration.worker.cpu.masked_tiles import TileTensors
from vllm_sepllm.integration.worker.cpu.sequences import SequenceKernel
from vllm_sepllm.integration.worker.impl import SlotMoves
from vllm_sepllm.policy.keys.masked_tiles import query_tiles
from vllm_sepllm.policy.keys.sequences import sequence_tile, tile_sequences
from vllm_sepllm.policy.step.batch import BatchStep, Rotations
from vllm_sepllm.policy.step.prefill import Chunk
from vllm_sepllm.policy.visibility import IntArray

# the fastest of 64 to 512 for prefill at 8K with the window of 256 (2 cores, bf16 and fp32)
_TILE_SIZE = 128


class CPUBuilderMixin(BuilderMixin, CPUAttentionMetadataBuilder):
    """Mixin before vLLM's CPU builder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dtype = self.vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM resolves the name of a dtype in ModelConfig"
        self._query_dtype = dtype
        self._layout = probe_layout(
            self.num_kv_heads, self.head_dim, self._block_size, self._spec.dtype, self.isa
        )

    def take_layers(self, layers: Sequence[Any]) -> None:
        """See the base class."""
        self._kernel = None
        # a bounded score is never so low that an empty entry counts for nothing
        if not any(layer.impl.logits_soft_cap for layer in layers):
            heads = (self.num_heads, self.num_kv_heads, self.head_dim)
            self._kernel = SequenceKernel.of(*heads, self.isa, self._query_dtype)

    def without_requests(self, common: CommonAttentionMetadata) -> None:
        """See the base class; layers leave their cache alone."""

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """See the base class."""
        return torch.from_numpy(array)

    def upload_lengths(self, lengths: NDArray[np.int32]) -> torch.Tensor:
        """See the base class."""
        return torch.from_numpy(lengths)

    def entry_slots(
        self, rows: IntArray, entries: IntArray, common: CommonAttentionMetadata
    ) -> torch.Tensor:
        """See the base class; the slot of an entry below 0 has no meaning."""
        return torch.from_numpy(self._slots(rows, entries, common))

    def token_slots(self, step: BatchStep, common: CommonAttentionMetadata) -> torch.Tensor:
        """See the base class."""
        slots = self._slots(step.rows, step.target, common)
        if step.chunks:  # their tokens alone may have no slot
            slots[step.target < 0] = -1
        return torch.from_numpy(slots)

    def _slots(
        self, rows: IntArray, entries: IntArray, common: CommonAttentionMetadata
    ) -> IntArray:
        size = self._block_size
        block_ids = common.block_table_tensor.numpy()[rows, entries // size]
        return block_ids.astype(np.int64) * size + entries % size

    def slot_moves(self, slots: torch.Tensor) -> SlotMoves:
        """See the base class; elements of a flat cache."""
        return SlotMoves(*self._layout.slot_elements(slots).chunk(2))

    def copy(self, moves: SlotMoves | None) -> None:
        """See the base class."""
        if moves is not None:
            for layer in self._layers:
                copy_elements(layer.kv_cache, moves.source, moves.target)

    def turn(self, rotations: Rotations, common: CommonAttentionMetadata) -> None:
        """See the base class."""
        slots = self.entry_slots(rotations.rows, rotations.entries, common)
        delta = torch.from_numpy(rotations.delta)
        # [num_entries, num_kv_heads, head_size], K is the first half of an entry
        elements = self._layout.slot_elements(slots).view(len(slots), self.num_kv_heads, -1)
        elements = elements[..., : self.head_dim]
        index = elements.reshape(-1)
        for layer in self._layers:
            flat = layer.kv_cache.view(-1)
            keys = flat.index_select(0, index).view(elements.shape)
            flat.index_copy_(0, index, layer.impl.rotation.turned(keys, delta).view(-1))

    def prefill(self, step: BatchStep, common: CommonAttentionMetadata) -> PrefillRows:
        """See the base class."""
        table = common.block_table_tensor.numpy()
        chunks = [
            self._chunk_rows(chunk, int(step.first[row]), table[row])
            for row, chunk in enumerate(step.chunks, start=step.num_library)
        ]
        return PrefillRows(self._layout, chunks)

    def _chunk_rows(self, chunk: Chunk, first: int, block_ids: IntArray) -> ChunkRows:
        num_blocks = -(-chunk.num_cached // self._block_size)
        sequences, tiles = None, []
        kernel = self._kernel
        if kernel and (size := sequence_tile(chunk, _TILE_SIZE, kernel.block_size)):
            sequences = kernel.plan(tile_sequences(chunk, size, kernel.block_size))
        else:
            tiles = [TileTensors.of(t, self._query_dtype) for t in query_tiles(chunk, _TILE_SIZE)]
        return ChunkRows(
            first=first,
            last=first + chunk.end - chunk.start,
            block_ids=torch.from_numpy(block_ids[:num_blocks].astype(np.int64)),
            num_cached=chunk.num_cached,
            sequences=sequences,
            tiles=tiles,
        )
