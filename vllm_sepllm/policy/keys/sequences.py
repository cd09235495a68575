"""A prefill chunk as sequences that a causal kernel with a sliding window attends to rightly.

vLLM's CPU kernel knows causality and a sliding window, no mask. Each query tile becomes a sequence
of its own, three parts in blocks that tiles share::

    [ window keys that leave during the tile | keys that stay | window keys that do not, the tile ]

The kernel's window drops one entry a query from the front, which is what the policy's window drops.
Keys that stay although they leave the window (initial tokens and separators) are in the middle
part instead. In the place of such a separator is the one that it pushes out of a full tail, which
is read until just then, and otherwise an empty entry. With n the policy's window the kernel's is n
plus the length of the middle part, so tiles of one such length are one call; empty blocks make the
length of several tiles one.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step.prefill import Chunk
from vllm_sepllm.policy.visibility import IntArray

# at most 1/8 of the entries of a tile may be padding, to share a call with other tiles
_PADDING = 8


@dataclass(frozen=True, slots=True)
class TileSequences:
    """The sequences of a chunk's query tiles.

    Attributes:
        entries: [num_blocks, block_size] key number as in :mod:`vllm_sepllm.policy.step.prefill`;
            :attr:`empty` where no query may read.
        empty: one more than the highest key number.
        num_window: the first blocks: positions in order.
        num_leaving: the blocks after these: the first of them again, with other entries in the
            places of keys that stay.
        block_table: [num_tiles, max_blocks] blocks of each sequence, padded with 0.
        lengths: [num_tiles] entries of each sequence; its queries are the last ones.
        windows: [num_tiles] entries that a query reads, itself included and counted back.
        first: [num_tiles + 1] first query of each tile, counted from the chunk's start.
    """

    entries: IntArray
    empty: int
    num_window: int
    num_leaving: int
    block_table: IntArray
    lengths: IntArray
    windows: IntArray
    first: IntArray

    def calls(self) -> list[slice]:
        """Runs of tiles that share a window."""
        cuts = np.flatnonzero(np.diff(self.windows)) + 1
        edges = [0, *cuts.tolist(), len(self.windows)]
        return [slice(a, b) for a, b in pairwise(edges)]


def sequence_tile(chunk: Chunk, most: int, block_size: int) -> int:
    """Queries of a tile, ``most`` or fewer; 0 if the chunk cannot be laid out so.

    Keys that leave during a tile must all come before it.
    """
    return min(most, max(0, chunk.policy.window // block_size - 1) * block_size)


def tile_sequences(chunk: Chunk, tile_size: int, block_size: int) -> TileSequences:
    """Lay the chunk out in blocks.

    Args:
        chunk: at least one token.
        tile_size: from :func:`sequence_tile`, not 0.
        block_size: entries a block.
    """
    policy, start, end = chunk.policy, chunk.start, chunk.end
    origin = max(0, start - policy.window + 1)
    first = np.append(np.arange(start, end, tile_size), end)
    oldest = np.maximum(first[:-1] - policy.window + 1 - origin, 0) // block_size
    # the first block of the last part: none of its keys leaves before the tile's last query
    split = -(-np.maximum(first[1:] - policy.window - origin, 0) // block_size)
    stays, stay_positions = _staying(chunk)
    num_staying = np.searchsorted(stay_positions, origin + split * block_size)

    empty = chunk.num_cached + end - start
    num_window = -(-(end - origin) // block_size)
    window = np.full(num_window * block_size, empty)
    window[: end - origin] = chunk.key_numbers(np.arange(origin, end))
    leaving = window.copy()
    num_initial = min(policy.initial_tokens, end)
    in_window = np.flatnonzero((stay_positions >= origin) & (stay_positions < end))
    pushed = in_window - policy.bound
    leaving[stay_positions[in_window] - origin] = np.where(
        pushed >= num_initial, stays[np.maximum(pushed, 0)], empty
    )
    num_leaving, num_full = int(split[-1]), int(num_staying[-1]) // block_size
    middles = [_middle(count, num_initial, policy.bound, block_size) for count in num_staying]
    own = [np.append(stays[rest], np.full(-len(rest) % block_size, empty)) for _, rest in middles]
    parts = (
        window,
        leaving[: num_leaving * block_size],
        stays[: num_full * block_size],
        np.concatenate(own),
        np.full(block_size, empty),
    )
    num_own = np.array([len(part) // block_size for part in own])
    own_end = np.cumsum(num_own)
    middle = (num_own + [len(shared) for shared, _ in middles]) * block_size
    common = _common_lengths(middle, policy.window, block_size)
    at = np.cumsum([len(part) // block_size for part in parts])
    rows = [
        np.concatenate(
            [
                at[0] + np.arange(oldest[tile], split[tile]),
                at[1] + shared,
                at[2] + np.arange(own_end[tile] - num_own[tile], own_end[tile]),
                np.full((common[tile] - middle[tile]) // block_size, at[3]),
                np.arange(split[tile], -(-(first[tile + 1] - origin) // block_size)),
            ]
        )
        for tile, (shared, _) in enumerate(middles)
    ]
    table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for tile, row in enumerate(rows):
        table[tile, : len(row)] = row
    return TileSequences(
        entries=np.concatenate(parts).reshape(-1, block_size),
        empty=empty,
        num_window=num_window,
        num_leaving=num_leaving,
        block_table=table,
        lengths=common + first[1:] - origin - oldest * block_size,
        windows=common + policy.window,
        first=first - start,
    )


def _middle(count: int, num_initial: int, bound: int, block_size: int) -> tuple[IntArray, IntArray]:
    """What a tile reads of the first ``count`` keys that stay: whole blocks, and single keys.

    All initial tokens, and of the separators behind them the last ``bound``.
    """
    is_read = np.ones(count, dtype=bool)
    is_read[num_initial : max(num_initial, count - bound)] = False
    blocks = is_read[: count // block_size * block_size].reshape(-1, block_size)
    whole = np.flatnonzero(blocks.all(1))
    blocks[whole] = False
    return whole, np.flatnonzero(is_read)


def _common_lengths(middle: IntArray, window: int, block_size: int) -> IntArray:
    """Lengths that runs of tiles share: middle parts nearly alike are padded to the longest."""
    common, first = np.maximum.accumulate(middle), 0
    while first < len(common):
        most = common[first] + (common[first] + window) // _PADDING // block_size * block_size
        last = int(np.searchsorted(common, most, side="right"))
        common[first:last] = common[last - 1]
        first = last
    return common


def _staying(chunk: Chunk) -> tuple[IntArray, IntArray]:
    """Key number and position of initial tokens and separators, in order; tail: before all."""
    policy = chunk.policy
    initial = np.arange(min(policy.initial_tokens, chunk.end))
    tail = layout.tail_index(policy, layout.tail_ranks(policy, chunk.num_spilled))
    keys = (chunk.key_numbers(initial), tail, chunk.key_numbers(chunk.separators))
    # separators in the tail: any position before the window will do
    positions = (initial, np.full(len(tail), policy.initial_tokens), chunk.separators)
    return np.concatenate(keys), np.concatenate(positions)
