"""Prefill attention of a chunk by vLLM's own CPU kernel, over sequences in a scratch cache.

The sequences are those of :mod:`vllm_sepllm.policy.keys.sequences`. Heads are padded to the
kernel's next size; one padded element is 1 in every query, 0 in every key, and large and negative
in the empty entry, whose weight is therefore 0.
"""

from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from vllm import _custom_ops as vllm_ops

from vllm_sepllm.integration.worker.cpu.kv_layout import split_cache
from vllm_sepllm.policy.keys.sequences import TileSequences

# head sizes that vLLM's kernels are compiled for, up to twice the common ones
_KERNEL_SIZES = (64, 80, 96, 112, 128, 160, 192, 224, 256)
_BLOCK = 32  # entries a block; all kernels take multiples of it
_PIECE = 1024  # keys padded at once, so that they fit a processor's cache
# score of an empty entry: below every other, and a float16 when divided by the scale
_EMPTY_SCORE = -4e3


def padded_kernel(head_size: int, isa: str) -> tuple[int, str] | None:
    """Elements of a padded head, and vLLM's kernel for them; None if it has none.

    Heads of a multiple of 32 have the kernel "vec" and those of 16 "vec16", which is as fast, so
    the next size of either will do. "amx" takes multiples of 32 alone.
    """
    for size in _KERNEL_SIZES:
        if size > head_size and isa in ("vec", "vec16"):
            return size, "vec16" if size % 32 else "vec"
        if size > head_size and isa == "amx" and size % 32 == 0:
            return size, isa
    return None


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
    """vLLM's CPU kernel, as the layers of a group call it.

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
        """For heads of a size that a kernel serves; None if none serves a larger one."""
        padded = padded_kernel(head_size, isa)
        if padded is None:
            return None
        return cls(num_heads, num_kv_heads, padded[0], _BLOCK, padded[1], dtype, Scratch(dtype))

    def plan(self, sequences: TileSequences) -> "ChunkSequences":
        """Tensors of a chunk's sequences, and what the kernel's threads will do."""
        calls = [self._call(sequences, tiles) for tiles in sequences.calls()]
        return ChunkSequences(self, ScratchWrites.of(sequences), calls)

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
class ScratchWrites:
    """What a chunk puts into the scratch cache; slots are int64.

    Attributes:
        window_slots: [num_tokens] of the chunk's tokens, one after the other.
        cached: [num] int64 keys of the cache, by number.
        cached_slots: [num], ascending.
        num_first: of them the first, which are written before blocks are copied.
        tokens: [num] int64 of the chunk, to be written once more.
        token_slots: [num].
        empty_slots: [num], where nothing is to be read.
        num_blocks: of the scratch cache.
        copied: blocks that are copied from the first ones once the window is in these.
    """

    window_slots: torch.Tensor
    cached: torch.Tensor
    cached_slots: torch.Tensor
    num_first: int
    tokens: torch.Tensor
    token_slots: torch.Tensor
    empty_slots: torch.Tensor
    num_blocks: int
    copied: slice

    @classmethod
    def of(cls, sequences: TileSequences) -> "ScratchWrites":
        """Of the sequences' blocks."""
        num_tokens = int(sequences.first[-1])
        num_cached = sequences.empty - num_tokens
        num_blocks, block_size = sequences.entries.shape
        copied = slice(sequences.num_window, sequences.num_window + sequences.num_leaving)
        keys = sequences.entries.ravel()
        is_empty = keys == sequences.empty
        is_written = ~is_empty
        start, stop = copied.start * block_size, copied.stop * block_size
        is_written[start:stop] &= keys[start:stop] != keys[: stop - start]
        is_own = is_written & (keys >= num_cached)
        cached_slots, own_slots = np.flatnonzero(is_written & ~is_own), np.flatnonzero(is_own)
        # the window's are first, and in order
        window_slots, token_slots = own_slots[:num_tokens], own_slots[num_tokens:]
        return cls(
            window_slots=torch.from_numpy(window_slots),
            cached=torch.from_numpy(keys[cached_slots]),
            cached_slots=torch.from_numpy(cached_slots),
            num_first=int(np.searchsorted(cached_slots, start)),
            tokens=torch.from_numpy(keys[token_slots] - num_cached),
            token_slots=torch.from_numpy(token_slots),
            empty_slots=torch.from_numpy(np.flatnonzero(is_empty)),
            num_blocks=num_blocks,
            copied=copied,
        )


@dataclass(frozen=True, slots=True)
class ChunkSequences:
    """A chunk's sequences.

    Attributes:
        kernel: runs them.
        writes: fill the scratch cache.
        calls: in order of their queries.
    """

    kernel: SequenceKernel
    writes: ScratchWrites
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
        cache = self.fill(key, value, cached, scale)
        size = (len(query), kernel.num_heads, kernel.size)
        queries, out = (kernel.scratch.take(name, *size) for name in ("query", "out"))
        queries[..., :head_size] = query
        queries[..., head_size] = 1
        for call in self.calls:
            rows = slice(call.first, call.last)
            vllm_ops.cpu_attention_with_kv_cache(
                query=queries[rows],
                key_cache=cache[0],
                value_cache=cache[1],
                output=out[rows],
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
        output.copy_(out[..., :head_size])

    def fill(
        self, key: torch.Tensor, value: torch.Tensor, cached: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the scratch cache, in the kernel's own order; arguments as of ``attend``."""
        kernel, writes, head_size = self.kernel, self.writes, key.shape[2]
        block = (kernel.num_kv_heads, kernel.block_size, 2 * kernel.size)
        blocks = kernel.scratch.take("cache", writes.num_blocks, *block)
        cache = split_cache(blocks)
        self._write(key, value, writes.window_slots, cache)
        self._write_cached(cached, slice(writes.num_first), cache)
        copied = writes.copied
        blocks[copied] = blocks[: copied.stop - copied.start]
        self._write_cached(cached, slice(writes.num_first, None), cache)
        again = [part.index_select(0, writes.tokens) for part in (key, value)]
        self._write(again[0], again[1], writes.token_slots, cache)
        size = (len(writes.empty_slots), kernel.num_kv_heads, kernel.size)
        empty, zero = (kernel.scratch.take(name, *size) for name in ("empty key", "empty value"))
        empty[..., head_size] = _EMPTY_SCORE / scale
        vllm_ops.cpu_attn_reshape_and_cache(empty, zero, *cache, writes.empty_slots, kernel.isa)
        return cache

    def _write_cached(
        self,
        cached: torch.Tensor | None,
        which: slice,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Write some of the cache's keys; ``cached`` as of ``attend``."""
        if cached is not None:
            rows = cached.index_select(1, self.writes.cached[which]).transpose(0, 1)
            key, value = rows.chunk(2, dim=2)
            self._write(key, value, self.writes.cached_slots[which], cache)

    def _write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Pad ``key`` and ``value`` [num_slots, num_kv_heads, head_size] and write them."""
        kernel = self.kernel
        for first in range(0, len(slots), _PIECE):
            piece = slots[first : first + _PIECE]
            size = (len(piece), kernel.num_kv_heads, kernel.size)
            keys, values = kernel.scratch.take("key", *size), kernel.scratch.take("value", *size)
            for padded, part in ((keys, key), (values, value)):
                padded[..., : key.shape[2]] = part[first : first + _PIECE]
            vllm_ops.cpu_attn_reshape_and_cache(keys, values, *cache, piece, kernel.isa)
