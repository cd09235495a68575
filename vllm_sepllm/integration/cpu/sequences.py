"""Prefill attention of a chunk by vLLM's own CPU kernel, over sequences in a scratch cache.

The sequences are those of :mod:`vllm_sepllm.policy.sequences`. Heads are padded to the kernel's
next size; one padded element is 1 in every query, 0 in every key, and large and negative in the
empty entry, whose weight is therefore 0.
"""

from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from vllm import _custom_ops as vllm_ops

from vllm_sepllm.integration.cpu.kv_layout import split_cache
from vllm_sepllm.policy.sequences import TileSequences

# head sizes that vLLM's kernels "amx" and "vec" are compiled for, up to twice the common ones
_KERNEL_SIZES = (64, 96, 128, 160, 192, 224, 256)
_ISAS = ("amx", "vec")
_BLOCK = 32  # entries; both know multiples of it
_PIECE = 4096
# no other score is as low, and divided by a scale it is a float16
_EMPTY_SCORE = -4e3


def padded_size(head_size: int, isa: str) -> int | None:
    """Elements of a padded head; None if vLLM's kernel has no such size."""
    sizes = [size for size in _KERNEL_SIZES if size > head_size]
    return sizes[0] if sizes and isa in _ISAS else None


class Scratch:
    """Buffers that all layers use in turn; they grow and are kept, zero where never written."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, num_rows: int, *row: int) -> torch.Tensor:
        """[num_rows, *row], rows where they were in the last call of the name."""
        size = num_rows * prod(row)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            self._buffers[name] = held = torch.zeros(size, dtype=self._dtype)
        return held[:size].view(num_rows, *row)


@dataclass(frozen=True, slots=True)
class SequenceCall:
    """Tiles that the kernel attends to at once.

    Attributes:
        first: first query, counted from the chunk's start.
        last: end of the queries, exclusive.
        starts: [num_tiles + 1] int32 first query of each tile, counted from ``first``.
        lengths: [num_tiles] int32.
        table: [num_tiles, max_blocks] int32.
        window: entries that a query reads.
        metadata: vLLM's, how threads share the work.
    """

    first: int
    last: int
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    window: int
    metadata: torch.Tensor


@dataclass(frozen=True, slots=True)
class SequenceKernel:
    """What the layers of a group have in common.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        size: elements of a padded head.
        block_size: entries a block.
        isa: vLLM's name of the kernel.
        dtype: of queries and keys.
        scratch: shared by the layers.
    """

    num_heads: int
    num_kv_heads: int
    size: int
    block_size: int
    isa: str
    dtype: torch.dtype
    scratch: Scratch = field(repr=False)

    @classmethod
    def of(
        cls, num_heads: int, num_kv_heads: int, head_size: int, isa: str, dtype: torch.dtype
    ) -> "SequenceKernel | None":
        """For heads of a size; None if vLLM's kernel has no larger one."""
        size = padded_size(head_size, isa)
        if size is None:
            return None
        return cls(num_heads, num_kv_heads, size, _BLOCK, isa, dtype, Scratch(dtype))

    def plan(self, sequences: TileSequences) -> "ChunkSequences":
        """Tensors of a chunk's sequences, and what the kernel's threads will do."""
        calls = [self._call(sequences, tiles) for tiles in sequences.calls()]
        # the empty entry is row 0 of the keys
        entries = np.where(sequences.entries == sequences.empty, -1, sequences.entries) + 1
        slots = torch.arange(entries.size)
        return ChunkSequences(self, torch.from_numpy(entries.ravel()), slots, calls)

    def _call(self, sequences: TileSequences, tiles: slice) -> SequenceCall:
        first = sequences.first[tiles.start : tiles.stop + 1].astype(np.int32)
        window = int(sequences.windows[tiles.start])
        starts = torch.from_numpy(first - first[0])
        lengths = torch.from_numpy(sequences.lengths[tiles].astype(np.int32))
        table = torch.from_numpy(sequences.block_table[tiles].astype(np.int32))
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.size,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=window,
            isa=self.isa,
            enable_kv_split=False,
        )
        return SequenceCall(int(first[0]), int(first[-1]), starts, lengths, table, window, metadata)


@dataclass(frozen=True, slots=True)
class ChunkSequences:
    """A chunk's sequences.

    Attributes:
        kernel: that runs them.
        entries: [num_slots] int64: 0 empty, else 1 + key number.
        slots: [num_slots] int64: 0, 1, ...
        calls: in order of their queries.
    """

    kernel: SequenceKernel
    entries: torch.Tensor
    slots: torch.Tensor
    calls: list[SequenceCall]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cached: torch.Tensor | None,
        scale: float,
        sinks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attention of the chunk.

        Args:
            query: [num_tokens, num_heads, head_size].
            key: [num_tokens, num_kv_heads, head_size].
            value: like ``key``.
            cached: [num_kv_heads, num_cached, 2 * head_size], K and V of the cache; None: empty.
            scale: factor on query times key.
            sinks: [num_heads], score of an extra key without a value; None: none.
            output: like ``query``, written.
        """
        kernel, head_size = self.kernel, query.shape[2]
        cached_key, cached_value = (None, None) if cached is None else cached.chunk(2, dim=2)
        keys = self._padded("key", key, cached_key, _EMPTY_SCORE / scale)
        values = self._padded("value", value, cached_value, 0.0)
        cache = self._write(keys, values)
        for call in self.calls:
            rows = slice(call.first, call.last)
            size = (call.last - call.first, kernel.num_heads, kernel.size)
            queries, out = (kernel.scratch.take(name, *size) for name in ("query", "out"))
            queries[..., :head_size] = query[rows]
            queries[..., head_size] = 1
            vllm_ops.cpu_attention_with_kv_cache(
                query=queries,
                key_cache=cache[0],
                value_cache=cache[1],
                output=out,
                query_start_loc=call.starts,
                seq_lens=call.lengths,
                scale=scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=call.window,
                block_table=call.table,
                softcap=0.0,
                scheduler_metadata=call.metadata,
                s_aux=sinks,
            )
            output[rows] = out[..., :head_size]

    def _padded(
        self, name: str, own: torch.Tensor, cached: torch.Tensor | None, empty: float
    ) -> torch.Tensor:
        """[1 + num_keys, num_kv_heads, size]: the empty entry, then the keys by number."""
        kernel, (num_tokens, heads, head_size) = self.kernel, own.shape
        num_cached = 0 if cached is None else cached.shape[1]
        rows = kernel.scratch.take(name, 1 + num_cached + num_tokens, heads, kernel.size)
        rows[0, :, head_size] = empty
        if cached is not None:
            rows[1 : 1 + num_cached, :, :head_size] = cached.transpose(0, 1)
        rows[1 + num_cached :, :, :head_size] = own
        return rows

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V caches in the kernel's own order, in pieces that a processor's cache holds."""
        kernel = self.kernel
        num_blocks = len(self.entries) // kernel.block_size
        block = (kernel.num_kv_heads, kernel.block_size, 2 * kernel.size)
        cache = split_cache(kernel.scratch.take("cache", num_blocks, *block))
        for first in range(0, len(self.entries), _PIECE):
            piece = slice(first, first + _PIECE)
            entries = self.entries[piece]
            size = (len(entries), kernel.num_kv_heads, kernel.size)
            key, value = (
                torch.index_select(rows, 0, entries, out=kernel.scratch.take(name, *size))
                for rows, name in ((keys, "keys of a piece"), (values, "values of a piece"))
            )
            vllm_ops.cpu_attn_reshape_and_cache(key, value, *cache, self.slots[piece], kernel.isa)
        return cache
