"""Turns the step's plan into slots, compact lengths and query tiles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.cpu.kv_layout import probe_layout
from vllm_sepllm.integration.worker.cpu.metadata import (
    CheckpointWrites,
    ChunkRows,
    LibraryRows,
    PrefillRows,
    SepLLMCPUMetadata,
    SlotCopies,
    TileTensors,
)
from vllm_sepllm.integration.worker.cpu.sequences import SequenceKernel
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.keys.sequences import sequence_tile, tile_sequences
from vllm_sepllm.policy.step import checkpoint, decode, prefill
from vllm_sepllm.policy.step.plan import BatchRows
from vllm_sepllm.policy.visibility import BoolArray, IntArray

# the fastest of 64 to 512 for prefill at 8K with the window of 256 (2 cores, bf16 and fp32)
_TILE_SIZE = 128


class SepLLMCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's CPU builder for rows that read their cache alone; ours for prefill chunks."""

    # single-token rows first: they are one call of vLLM's kernel
    reorder_batch_threshold = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spec = self.kv_cache_spec
        assert isinstance(spec, SepLLMSpec), f"not a SepLLM layer: {spec}"
        self._policy = spec.policy
        dtype = self.vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM resolves the name of a dtype in ModelConfig"
        self._query_dtype = dtype
        self._layout = probe_layout(
            self.num_kv_heads, self.head_dim, self.block_size, spec.dtype, self.isa
        )
        self._kernel = self._sequence_kernel()
        self._step: CurrentStep | None = None

    def _sequence_kernel(self) -> SequenceKernel | None:
        """vLLM's kernel for prefill; None if it has no head of one more element, or bounds scores.

        A bounded score is never so low that an entry counts for nothing.
        """
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        if any(layer.impl.logits_soft_cap for layer in layers.values()):  # type: ignore[attr-defined]
            return None
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        return SequenceKernel.of(*heads, self.isa, self._query_dtype)

    def bind(
        self, step: CurrentStep, request_ids: Callable[[], Sequence[str]], group_id: int
    ) -> None:
        """Say where the plan of each step is, whose rows the runner's batch has, and which group.

        ``group_id`` is the KV cache group that this builds for.
        """
        self._step = step
        self._request_ids = request_ids
        self._group_id = group_id

    def build(  # type: ignore[override]  # the metadata of this backend, not of the wrapped one
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SepLLMCPUMetadata | None:
        """See vLLM's AttentionMetadataBuilder.build; None when the model runs without requests."""
        assert self._step is not None, "the worker did not bind the builder"
        if self._step.is_dummy:
            return None
        common = common_attn_metadata
        rows = self._step.rows(self._request_ids()[: common.num_reqs], self._group_id)
        first = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        block_table = common.block_table_tensor.numpy()
        if common.max_query_len == 1:
            return SepLLMCPUMetadata(
                checkpoints=self._checkpoint_writes(rows, first, block_table),
                library=self._decode_rows(common, rows, block_table),
                prefill=None,
            )
        num_new = np.diff(first)
        num_dense = rows.policy(self._policy).num_dense
        is_library = (num_new == 1) | (rows.start + num_new <= num_dense)
        return SepLLMCPUMetadata(
            checkpoints=self._checkpoint_writes(rows, first, block_table),
            library=self._library_rows(common, rows, first, block_table, is_library),
            prefill=self._prefill_rows(rows, first, block_table, np.flatnonzero(~is_library)),
        )

    def _slots(self, block_ids: IntArray, compact: IntArray) -> torch.Tensor:
        """Slot of entry ``compact`` in the block ``block_ids`` that holds it, elementwise."""
        slots = block_ids.astype(np.int64) * self.block_size + compact % self.block_size
        return torch.from_numpy(slots)

    def _checkpoint_writes(
        self, rows: BatchRows, first: IntArray, block_table: IntArray
    ) -> CheckpointWrites | None:
        if not any(rows.checkpoints):
            return None
        source: list[torch.Tensor] = []
        target: list[torch.Tensor] = []
        tokens: list[IntArray] = []
        slots: list[torch.Tensor] = []
        for row, planned in enumerate(rows.checkpoints):
            for item in planned:
                chunk = self._chunk(rows, row, int(first[row + 1] - first[row]))
                blocks = list(item.blocks)
                part = checkpoint.checkpoint_parts(chunk, item.position, self.block_size, blocks)
                own = np.zeros(max(blocks) + 1, dtype=np.int64)
                own[blocks] = list(item.blocks.values())
                held_by = block_table[row, part.copy_source // self.block_size]
                source.append(self._slots(held_by, part.copy_source))
                target.append(
                    self._slots(own[part.copy_target // self.block_size], part.copy_target)
                )
                tokens.append(part.tokens + first[row])
                slots.append(self._slots(own[part.target // self.block_size], part.target))
        copied = [self._layout.slot_elements(torch.cat(part)) for part in (source, target)]
        return CheckpointWrites(
            copies=SlotCopies(*copied) if len(copied[0]) else None,
            tokens=torch.from_numpy(np.concatenate(tokens)),
            slots=torch.cat(slots),
        )

    def _decode_rows(
        self, common: CommonAttentionMetadata, rows: BatchRows, block_table: IntArray
    ) -> LibraryRows:
        """A batch of single tokens: :meth:`_library_rows` with one token a row, in its order."""
        start, spilled, spills = rows.start, rows.num_spilled, rows.spills
        num_rows, policy = len(start), rows.policy(self._policy)
        compact = layout.ring_index(policy, start)
        block = compact // self.block_size
        slots = self._slots(block_table[np.arange(num_rows), block], compact)
        lengths = decode.compact_lengths(policy, start + 1, spilled, spills)
        copies = decode.spill_copies(policy, start, spilled, spills)
        return LibraryRows(
            spills=self._copies(block_table, copies.rows, copies.source, copies.target),
            tokens=None,
            num_tokens=num_rows,
            slots=slots,
            metadata=self._wrapped_metadata(
                common,
                slots,
                seq_lens=torch.from_numpy(lengths.astype(np.int32)),
                max_seq_len=int(lengths.max()),
            ),
        )

    def _library_rows(
        self,
        common: CommonAttentionMetadata,
        rows: BatchRows,
        first: IntArray,
        block_table: IntArray,
        is_library: BoolArray,
    ) -> LibraryRows | None:
        chosen = np.flatnonzero(is_library)
        if len(chosen) == 0:
            return None
        num_new = np.diff(first)[chosen]
        start, spilled, spills = rows.start[chosen], rows.num_spilled[chosen], rows.spills[chosen]
        query_first = np.concatenate([[0], np.cumsum(num_new)])
        owner = np.repeat(np.arange(len(chosen)), num_new)
        within = np.arange(query_first[-1]) - query_first[owner]

        policy = rows.policy(self._policy).of_rows(chosen)
        compact = layout.ring_index(policy.of_rows(owner), start[owner] + within)
        slots = self._slots(block_table[chosen[owner], compact // self.block_size], compact)
        is_prefix = bool(is_library[: len(chosen)].all())
        tokens = None if is_prefix else torch.from_numpy(first[chosen][owner] + within)
        lengths = decode.compact_lengths(policy, start + num_new, spilled, spills)
        metadata = self._library_metadata(
            common, query_first, lengths, slots, block_table if is_prefix else block_table[chosen]
        )
        copies = decode.spill_copies(policy, start, spilled, spills)
        owners = chosen[copies.rows]
        return LibraryRows(
            spills=self._copies(block_table, owners, copies.source, copies.target),
            tokens=tokens,
            num_tokens=len(owner),
            slots=slots,
            metadata=metadata,
        )

    def _library_metadata(
        self,
        common: CommonAttentionMetadata,
        query_first: IntArray,
        lengths: IntArray,
        slots: torch.Tensor,
        block_table: IntArray,
    ) -> CPUAttentionMetadata:
        query_start_loc = torch.from_numpy(query_first.astype(np.int32))
        return self._wrapped_metadata(
            common,
            slots,
            num_reqs=len(lengths),
            num_actual_tokens=len(slots),
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            max_seq_len=int(lengths.max()),
            max_query_len=int(np.diff(query_first).max()),
            block_table_tensor=torch.from_numpy(block_table[: len(lengths)]),
        )

    def _wrapped_metadata(
        self, common: CommonAttentionMetadata, slots: torch.Tensor, **changed: Any
    ) -> CPUAttentionMetadata:
        """vLLM's metadata, for ``common`` with other lengths and slots."""
        return super().build(0, replace(common, slot_mapping=slots, **changed))

    def _copies(
        self, block_table: IntArray, rows: IntArray, source: IntArray, target: IntArray
    ) -> SlotCopies | None:
        """Copies between compact entries of the batch's ``rows``, elementwise."""
        if len(rows) == 0:
            return None
        compact = np.concatenate([source, target])
        held_by = block_table[np.concatenate([rows, rows]), compact // self.block_size]
        return SlotCopies(
            *(self._layout.slot_elements(s) for s in self._slots(held_by, compact).chunk(2))
        )

    def _prefill_rows(
        self, rows: BatchRows, first: IntArray, block_table: IntArray, chosen: IntArray
    ) -> PrefillRows | None:
        if len(chosen) == 0:
            return None
        chunk_rows: list[ChunkRows] = []
        copies: list[tuple[IntArray, IntArray, IntArray]] = []
        tokens: list[IntArray] = []
        slots: list[torch.Tensor] = []
        for row in chosen.tolist():
            chunk = self._chunk(rows, row, int(first[row + 1] - first[row]))
            chunk_rows.append(self._chunk_rows(chunk, int(first[row]), block_table[row]))
            kept = prefill.survivors(chunk)
            owner = np.full(len(kept.copy_source), row)
            copies.append((owner, kept.copy_source, kept.copy_target))
            tokens.append(kept.tokens + first[row])
            block_ids = block_table[row, kept.target // self.block_size]
            slots.append(self._slots(block_ids, kept.target))
        owners, source, target = (np.concatenate(part) for part in zip(*copies, strict=True))
        num_keys = (len(tile.keys) for chunk in chunk_rows for tile in chunk.tiles)
        most_keys = max(num_keys, default=0)
        return PrefillRows(
            layout=self._layout,
            chunks=chunk_rows,
            zeros=torch.zeros(_TILE_SIZE, most_keys, dtype=self._query_dtype),
            copies=self._copies(block_table, owners, source, target),
            tokens=torch.from_numpy(np.concatenate(tokens)),
            slots=torch.cat(slots),
        )

    def _chunk(self, rows: BatchRows, row: int, num_new_tokens: int) -> prefill.Chunk:
        separators = rows.separators[row]
        assert separators is not None, "the plan of a row of several tokens lists its separators"
        start, policy = int(rows.start[row]), rows.policy(self._policy).of_row(row)
        return prefill.Chunk(
            policy, start, start + num_new_tokens, int(rows.num_spilled[row]), separators
        )

    def _chunk_rows(self, chunk: prefill.Chunk, first: int, block_ids: IntArray) -> ChunkRows:
        num_blocks = -(-chunk.num_cached // self.block_size)
        sequences, tiles = None, []
        kernel = self._kernel
        if kernel and (size := sequence_tile(chunk, _TILE_SIZE, kernel.block_size)):
            sequences = kernel.plan(tile_sequences(chunk, size, kernel.block_size))
        else:
            tiles = [
                TileTensors.of(t, self._query_dtype) for t in prefill.query_tiles(chunk, _TILE_SIZE)
            ]
        return ChunkRows(
            first=first,
            last=first + chunk.end - chunk.start,
            block_ids=torch.from_numpy(block_ids[:num_blocks].astype(np.int64)),
            num_cached=chunk.num_cached,
            sequences=sequences,
            tiles=tiles,
        )
