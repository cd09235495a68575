"""Which keys each query tile of a prefill step touches, as tables for the prefill kernel.

A key is visible to the queries at positions [its own, its ``until``). For initial tokens ``until``
is never, for other tokens it is position + window, and for a separator it is never or, in bounded
mode, the position at which the separator ``max_separators`` ranks later leaves the window. Rank =
index among the request's separators at positions >= initial_tokens, in order.

The keys of a tile are three ranges: initial tokens and separators (by rank) older than the tile's
window, and all positions in its window. A tile is therefore one row of integers, whatever the
length of the request, and what the tables hold grows with the chunk, not with the context. The keys
that the tiles of a request touch are listed on the device (:func:`vllm_sepllm.ops.list_keys`).
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from vllm_sepllm.policy.visibility import BatchPolicy, IntArray

NEVER = 2**31 - 1
UNBOUNDED = 2**30  # as max_separators: more than any request has, and UNBOUNDED + rank fits int32
_ALIGN = 4  # int32 words; each table starts on 16 bytes, as Triton specialises on pointer alignment


@dataclass(frozen=True, slots=True)
class PrefillRequests:
    """The prefill requests of a step; one array element a request, all int64.

    Attributes:
        table_row: [num_requests] row of the block table.
        query_start: [num_requests] row of the chunk's first token in the activations.
        chunk_start: [num_requests] position of the chunk's first token.
        chunk_end: [num_requests] position after the chunk's last token.
        num_spilled: [num_requests] separators at positions [initial_tokens, chunk_start - window):
            those that left the window before this step, written to the tail or forgotten.
        separators: [num_separators] positions of the separators at positions
            [max(initial_tokens, chunk_start - window), chunk_end), ascending, request by request.
        separators_start: [num_requests + 1] offsets of the requests in ``separators``.
    """

    table_row: IntArray
    query_start: IntArray
    chunk_start: IntArray
    chunk_end: IntArray
    num_spilled: IntArray
    separators: IntArray
    separators_start: IntArray

    @classmethod
    def lone_token(cls) -> "PrefillRequests":
        """A request's first token alone: what a warm-up runs."""
        zero, none = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return cls(zero, zero, zero, zero + 1, zero, none, np.zeros(2, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Tables of a step, all int32 views into ``packed`` (one copy brings them to the device).

    Attributes:
        packed: [size] tiles, requests, separators and until, each padded to 16 bytes.
        tiles: [num_tiles, 8] request, first row in the activations, first position, num_tokens,
            window_start (first position in the window of the first query), rank_start, rank_split,
            rank_end. Far separators are the ranks [rank_start, rank_split) in the cache and
            [rank_split, rank_end) in the chunk.
        requests: [num_requests, 13] table_row, chunk_start, chunk_end, query_start, num_spilled,
            offset in ``separators``, number of separators there, offset of position 0 in ``until``,
            window, offset in the list of keys, rank_start, rank_split, rank_end: the far separators
            that any of its tiles reads.
        separators: [num_separators] as in :class:`PrefillRequests`.
        until: [num_positions] ``until`` of the positions that leave the window during the chunk,
            [chunk_start - window + 1, chunk_end - window) of each request, from 0 at the lowest.
        num_keys: [num_requests] length of each request's list of keys: initial tokens, cached far
            separators and ring, then far separators of the chunk and the chunk itself.
        tile_tokens: tokens of a full tile.
    """

    packed: NDArray[np.int32]
    tiles: NDArray[np.int32]
    requests: NDArray[np.int32]
    separators: NDArray[np.int32]
    until: NDArray[np.int32]
    num_keys: IntArray
    tile_tokens: int

    @property
    def tables(self) -> tuple[NDArray[np.int32], ...]:
        """The tables in the order of ``packed``."""
        return self.tiles, self.requests, self.separators, self.until

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each of ``tables`` starts in ``packed``, in int32 words."""
        return tuple(accumulate((_padded(table.size) for table in self.tables[:-1]), initial=0))


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def plan_tiles(requests: PrefillRequests, policy: BatchPolicy, tile_tokens: int) -> PrefillTiles:
    """Cut the chunks of a step into tiles and find the keys that each tile touches.

    Args:
        requests: the step's prefill requests; empty chunks are allowed and get no tile.
        policy: a, n and s of the requests.
        tile_tokens: query tokens a tile, from :func:`vllm_sepllm.ops.prefill_tile_tokens`.

    Raises:
        ValueError: if a separator lies outside the positions that matter in this step.
    """
    window = np.broadcast_to(policy.window, requests.chunk_start.shape)
    _check_separators(requests, policy)
    first = np.maximum(0, requests.chunk_start - policy.window + 1)
    # what is in the window of the chunk's last query is in that of all before it
    num_positions = np.maximum(requests.chunk_end - policy.window - first, 0)
    until_start = np.cumsum(num_positions) - num_positions - first
    until = _until(requests, policy, first, num_positions)
    starts = requests.separators_start
    everyone = np.arange(len(requests.chunk_start))
    first_in_chunk = requests.num_spilled + _count_below(requests, everyone, requests.chunk_start)
    tiles = _tile_rows(requests, policy, first_in_chunk, tile_tokens)
    ranks = _rank_ranges(tiles, first_in_chunk)
    num_keys = _num_keys(requests, policy, ranks)
    request_rows = (
        requests.table_row,
        requests.chunk_start,
        requests.chunk_end,
        requests.query_start,
        requests.num_spilled,
        starts[:-1],
        np.diff(starts),
        until_start,
        window,
        np.cumsum(num_keys) - num_keys,
        *ranks,
    )
    packed, views = _pack(tiles, request_rows, requests.separators, until)
    return PrefillTiles(packed, views[0], views[1], views[2], views[3], num_keys, tile_tokens)


def rank_bound(policy: BatchPolicy) -> int:
    """``max_separators`` as a number: :data:`UNBOUNDED` stands for no bound."""
    return UNBOUNDED if policy.max_separators is None else policy.max_separators


def _check_separators(requests: PrefillRequests, policy: BatchPolicy) -> None:
    owner = np.repeat(np.arange(len(requests.chunk_start)), np.diff(requests.separators_start))
    lowest = np.maximum(policy.initial_tokens, requests.chunk_start - policy.window)[owner]
    highest = requests.chunk_end[owner]
    wrong = (requests.separators < lowest) | (requests.separators >= highest)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(
            f"separators[{index}] must be a position in [{lowest[index]}, {highest[index]}), got "
            f"{requests.separators[index]}: leave out initial tokens and separators that have left"
        )


def _until(
    requests: PrefillRequests, policy: BatchPolicy, first: IntArray, num_positions: IntArray
) -> IntArray:
    """First position that no longer sees each token that leaves the window, request by request.

    Args:
        requests: the step's prefill requests.
        policy: a, n and s of the requests.
        first: [num_requests] lowest position to cover.
        num_positions: [num_requests] positions to cover.
    """
    offset = np.cumsum(num_positions) - num_positions - first
    position = np.arange(num_positions.sum()) - np.repeat(offset, num_positions)
    window = policy.of_rows(np.repeat(np.arange(len(first)), num_positions)).window
    until = np.where(position < policy.initial_tokens, NEVER, position + window)
    separators, counts = requests.separators, np.diff(requests.separators_start)
    owner = np.repeat(np.arange(len(counts)), counts)
    later = np.arange(len(separators)) + rank_bound(policy)
    is_known = later < requests.separators_start[1:][owner]
    leaves = np.full(len(separators), NEVER)
    leaves[is_known] = separators[later[is_known]] + policy.of_rows(owner[is_known]).window
    # chunk_start - window is in the ring for its spill alone: no query of the chunk has it in view
    is_covered = (separators >= first[owner]) & (separators < (first + num_positions)[owner])
    until[(offset[owner] + separators)[is_covered]] = leaves[is_covered]
    return until


def _tile_rows(
    requests: PrefillRequests, policy: BatchPolicy, first_in_chunk: IntArray, tile_tokens: int
) -> tuple[IntArray, ...]:
    """Columns of :attr:`PrefillTiles.tiles`, each [num_tiles].

    ``first_in_chunk`` is [num_requests] the rank of the first separator in the chunk, there or not.
    """
    start, end = requests.chunk_start, requests.chunk_end
    num_tiles = -(-(end - start) // tile_tokens)
    owner = np.repeat(np.arange(len(start)), num_tiles)
    index = np.arange(num_tiles.sum()) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    position = start[owner] + index * tile_tokens
    window_start = np.maximum(0, position - policy.of_rows(owner).window + 1)
    num_spilled = requests.num_spilled[owner]
    rank_end = num_spilled + _count_below(requests, owner, window_start)
    rank_start = np.maximum(0, rank_end - rank_bound(policy))
    return (
        owner,
        requests.query_start[owner] + index * tile_tokens,
        position,
        np.minimum(tile_tokens, end[owner] - position),
        window_start,
        rank_start,
        np.clip(first_in_chunk[owner], rank_start, rank_end),
        rank_end,
    )


def _rank_ranges(tiles: tuple[IntArray, ...], first_in_chunk: IntArray) -> tuple[IntArray, ...]:
    """rank_start, rank_split and rank_end over all tiles of each request, 0 without a tile."""
    owner, rank_start, rank_end = tiles[0], tiles[5], tiles[7]
    has_tiles, first = np.unique(owner, return_index=True)
    last = np.append(first[1:], len(owner))[: len(first)] - 1
    start, end = np.zeros((2, len(first_in_chunk)), dtype=np.int64)
    # later tiles read later ranks
    start[has_tiles], end[has_tiles] = rank_start[first], rank_end[last]
    return start, np.clip(first_in_chunk, start, end), end


def _num_keys(
    requests: PrefillRequests, policy: BatchPolicy, ranks: tuple[IntArray, ...]
) -> IntArray:
    """[num_requests] as in :class:`PrefillTiles`."""
    start, length = requests.chunk_start, requests.chunk_end - requests.chunk_start
    initial, ring = np.minimum(policy.initial_tokens, start), np.minimum(start, policy.window - 1)
    return np.where(length > 0, initial + ring + ranks[2] - ranks[0] + length, 0)


def _count_below(requests: PrefillRequests, owner: IntArray, position: IntArray) -> IntArray:
    """How many of the owner's listed separators lie before each position; [num_tiles]."""
    starts = requests.separators_start
    # one sorted key over all requests: positions are below 2**31
    keys = requests.separators + np.repeat(np.arange(len(starts) - 1) << 32, np.diff(starts))
    return np.searchsorted(keys, position + (owner << 32)) - starts[owner]


def _pack(
    tiles: tuple[IntArray, ...],
    request_rows: tuple[IntArray, ...],
    separators: IntArray,
    until: IntArray,
) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
    """Write the tables into one array and keep a view of each."""
    parts = [np.stack(tiles, axis=1), np.stack(request_rows, axis=1), separators, until]
    packed = np.zeros(sum(_padded(part.size) for part in parts), dtype=np.int32)
    views: list[NDArray[np.int32]] = []
    first = 0
    for part in parts:
        view = packed[first : first + part.size].reshape(part.shape)
        view[:] = part
        views.append(view)
        first += _padded(part.size)
    return packed, views
