"""Which keys each query tile of a prefill step touches, as tables for the kernels.

A key is visible to the queries at positions [its own, its ``until``). For initial tokens ``until``
is never, for other tokens it is position + window, and for a separator it is never or, in bounded
mode, the position at which the separator ``max_separators`` ranks later leaves the window. Rank =
index among the request's separators at positions >= initial_tokens, in order.

The keys of a tile are three ranges: initial tokens and separators (by rank) older than the tile's
window ("far"), and all positions in its window ("near"). A tile is therefore one row of integers,
whatever the length of the request, and what the tables hold grows with the chunk, not with the
context. The keys that the tiles of a request touch are listed once, on the device
(:func:`vllm_sepllm.ops.list_keys`): a tile names ranges of that list.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_sepllm.policy.keys.columns import REQUEST, TILE
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray

NEVER = 2**31 - 1
_WORD = 4  # bytes
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
    """Tables of a step, all views into ``packed`` (one copy brings them to the device).

    Attributes:
        packed: [size] int32: tiles, requests, separators and until, each padded to 16 bytes.
        tiles: [num_tiles] of :data:`vllm_sepllm.policy.keys.columns.TILE`.
        requests: [num_requests] of :data:`vllm_sepllm.policy.keys.columns.REQUEST`.
        separators: [num_separators] int32 as in :class:`PrefillRequests`.
        until: [num_positions] int32, ``until`` of the positions that leave the window during the
            chunk, [chunk_start - window + 1, chunk_end - window) of each request, from 0 at the
            lowest.
        tile_tokens: tokens of a full tile.
        bound: of the separators, of the policy that the tables were made for.
    """

    packed: NDArray[np.int32]
    tiles: NDArray[np.void]
    requests: NDArray[np.void]
    separators: NDArray[np.int32]
    until: NDArray[np.int32]
    tile_tokens: int
    bound: int

    @property
    def tables(self) -> dict[str, NDArray[Any]]:
        """Name -> table, in the order of ``packed``."""
        return {name: getattr(self, name) for name in ("tiles", "requests", "separators", "until")}

    @property
    def offsets(self) -> dict[str, int]:
        """Name -> where the table starts in ``packed``, in int32 words."""
        sizes = list(map(_padded, self.tables.values()))
        return dict(zip(self.tables, accumulate(sizes[:-1], initial=0), strict=True))


def plan_tiles(requests: PrefillRequests, policy: BatchPolicy, tile_tokens: int) -> PrefillTiles:
    """Cut the chunks of a step into tiles and find the keys that each tile touches.

    Args:
        requests: the step's prefill requests; empty chunks are allowed and get no tile.
        policy: a, n and s of the requests.
        tile_tokens: query tokens a tile, from :func:`vllm_sepllm.ops.prefill_tile_tokens`.

    Raises:
        ValueError: if a separator lies outside the positions that matter in this step.
    """
    rows, bound = _request_rows(requests, policy), policy.bound
    _check_separators(requests, rows)
    cuts = _cut(requests, rows, bound, tile_tokens)
    _lay_out_lists(rows, cuts)
    until = _until(requests, rows, bound)
    tables: dict[str, NDArray[Any]] = {
        "tiles": _tile_rows(rows, cuts, bound),
        "requests": rows,
        "separators": requests.separators.astype(np.int32),
        "until": until,
    }
    packed = np.zeros(sum(_padded(table) for table in tables.values()), dtype=np.int32)
    views, first = {}, 0
    for name, table in tables.items():
        words = packed[first : first + table.nbytes // _WORD]
        words[:] = table.view(np.int32)
        views[name] = words.view(table.dtype)
        first += _padded(table)
    return PrefillTiles(packed, **views, tile_tokens=tile_tokens, bound=bound)


def _padded(table: NDArray[Any]) -> int:
    """Words of a table in ``packed``, with those up to the next one."""
    return -(-table.nbytes // (_WORD * _ALIGN)) * _ALIGN


def _request_rows(requests: PrefillRequests, policy: BatchPolicy) -> NDArray[np.void]:
    """The table of requests; :func:`_lay_out_lists` and :func:`_until` fill what is not given."""
    rows = np.zeros(len(requests.chunk_start), dtype=REQUEST)
    rows["initial_tokens"] = policy.initial_tokens
    rows["window"] = policy.window
    for name in ("table_row", "query_start", "chunk_start", "chunk_end", "num_spilled"):
        rows[name] = getattr(requests, name)
    rows["window_start"] = np.maximum(0, rows["chunk_start"] - rows["window"] + 1)
    rows["separators_start"] = requests.separators_start[:-1]
    rows["num_separators"] = np.diff(requests.separators_start)
    return rows


def _check_separators(requests: PrefillRequests, rows: NDArray[np.void]) -> None:
    lowest = np.maximum(rows["initial_tokens"], rows["chunk_start"] - rows["window"])
    counts = rows["num_separators"]
    is_low = requests.separators < np.repeat(lowest, counts)
    wrong = is_low | (requests.separators >= np.repeat(rows["chunk_end"], counts))
    if wrong.any():
        index = int(np.argmax(wrong))
        owner = np.searchsorted(requests.separators_start, index, side="right") - 1
        raise ValueError(
            f"separators[{index}] must be a position in [{lowest[owner]}, "
            f"{rows['chunk_end'][owner]}), got {requests.separators[index]}: leave out initial "
            "tokens and separators that have left"
        )


@dataclass(frozen=True, slots=True)
class _Cuts:
    """The tiles of a step.

    Attributes:
        num_tiles: [num_requests].
        first_in_chunk: [num_requests] rank of the first separator in the chunk, there or not.
        owner: [num_tiles] index of the tile's request, and so below.
        position: of its first token.
        num_tokens: its tokens.
        window_start: first position in the window of its first query.
        rank_start: first far separator that its first query sees.
        rank_split: first far separator in the chunk, or rank_end.
        rank_end: first separator that is not far for its first query.
    """

    num_tiles: IntArray
    first_in_chunk: IntArray
    owner: IntArray
    position: IntArray
    num_tokens: IntArray
    window_start: IntArray
    rank_start: IntArray
    rank_split: IntArray
    rank_end: IntArray


def _cut(requests: PrefillRequests, rows: NDArray[np.void], bound: int, tile_tokens: int) -> _Cuts:
    num_tiles = -(-(requests.chunk_end - requests.chunk_start) // tile_tokens)
    everyone = np.arange(len(rows))
    owner = np.repeat(everyone, num_tiles)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    position = requests.chunk_start[owner] + index * tile_tokens
    window_start = np.maximum(0, position - rows["window"][owner] + 1)
    # ranks by one sorted key over all requests: positions are below 2**31
    keys = requests.separators + np.repeat(everyone << 32, rows["num_separators"])

    def rank_at(owner: IntArray, position: IntArray) -> IntArray:
        """Rank of the owner's first separator at or after a position, there or not."""
        before = np.searchsorted(keys, position + (owner << 32))
        return before + (requests.num_spilled - requests.separators_start[:-1])[owner]

    first_in_chunk = rank_at(everyone, requests.chunk_start)
    rank_end = rank_at(owner, window_start)
    rank_start = np.maximum(0, rank_end - bound)
    return _Cuts(
        num_tiles=num_tiles,
        first_in_chunk=first_in_chunk,
        owner=owner,
        position=position,
        num_tokens=np.minimum(tile_tokens, requests.chunk_end[owner] - position),
        window_start=window_start,
        rank_start=rank_start,
        rank_split=np.minimum(np.maximum(first_in_chunk[owner], rank_start), rank_end),
        rank_end=rank_end,
    )


def _lay_out_lists(rows: NDArray[np.void], cuts: _Cuts) -> None:
    """Fill the columns of the lists of keys: their parts, one behind the other."""
    end = np.cumsum(cuts.num_tiles)
    has_tiles = cuts.num_tiles > 0
    # later tiles read later ranks
    rows["rank_start"][has_tiles] = cuts.rank_start[(end - cuts.num_tiles)[has_tiles]]
    rows["rank_end"][has_tiles] = cuts.rank_end[(end - 1)[has_tiles]]
    rank_start, rank_end = rows["rank_start"], rows["rank_end"]
    rank_split = np.minimum(np.maximum(cuts.first_in_chunk, rank_start), rank_end)
    chunk_start, chunk_tokens = rows["chunk_start"], rows["chunk_end"] - rows["chunk_start"]

    rows["rank_split"] = rank_split
    rows["far_from"] = np.minimum(rows["initial_tokens"], chunk_start)
    rows["window_from"] = rows["far_from"] + rank_split - rank_start
    rows["chunk_far_from"] = rows["window_from"] + chunk_start - rows["window_start"]
    rows["chunk_from"] = rows["chunk_far_from"] + rank_end - rank_split
    num_keys = np.where(has_tiles, rows["chunk_from"] + chunk_tokens, 0)
    rows["num_keys"] = num_keys
    rows["keys_start"] = np.cumsum(num_keys) - num_keys


def _until(requests: PrefillRequests, rows: NDArray[np.void], bound: int) -> NDArray[np.int32]:
    """The table of until, request by request; fills the column that says where each begins."""
    # a token in the window of the chunk's last query is in the window of all that see it
    first, end = rows["window_start"], rows["chunk_end"] - rows["window"]
    num_positions = np.maximum(end - first, 0)
    start = np.cumsum(num_positions) - num_positions - first
    rows["until_start"] = start
    owner = np.repeat(np.arange(len(rows)), num_positions)
    position = np.arange(len(owner), dtype=np.int32) - rows["until_start"][owner]
    is_initial = position < rows["initial_tokens"][owner]
    until: NDArray[np.int32] = np.where(is_initial, NEVER, position + rows["window"][owner])

    separators, counts = requests.separators, rows["num_separators"]
    owner = np.repeat(np.arange(len(rows)), counts)
    # a separator stays until the one ``bound`` ranks later leaves the window
    later = np.arange(len(separators)) + bound
    is_known = later < requests.separators_start[1:][owner]
    leaves = np.full(len(separators), NEVER)
    leaves[is_known] = separators[later[is_known]] + rows["window"][owner[is_known]]
    # chunk_start - window is in the ring for its spill alone: no query of the chunk has it in view
    is_covered = (separators >= first[owner]) & (separators < end[owner])
    until[(start[owner] + separators)[is_covered]] = leaves[is_covered]
    return until


def _tile_rows(rows: NDArray[np.void], cuts: _Cuts, bound: int) -> NDArray[np.void]:
    """The table of tiles: ranges of positions and ranks as ranges of the lists of keys."""
    row, tiles = rows[cuts.owner], np.zeros(len(cuts.owner), dtype=TILE)
    chunk_start, window_start = row["chunk_start"], cuts.window_start
    tiles["chunk_query_start"] = row["query_start"]
    tiles["chunk_offset"] = cuts.position - chunk_start
    tiles["query_start"] = row["query_start"] + tiles["chunk_offset"]
    tiles["num_tokens"] = cuts.num_tokens
    tiles["position"] = cuts.position
    # initial tokens in the window are near
    num_initial = np.minimum(row["initial_tokens"], window_start)

    cached, start = tiles["cached"], row["keys_start"]
    cached["first_initial"] = start
    cached["num_initial"] = np.minimum(num_initial, chunk_start)
    cached["first_far"] = start + row["far_from"] + cuts.rank_start - row["rank_start"]
    cached["num_far"] = cuts.rank_split - cuts.rank_start
    cached["first_near"] = start + row["window_from"] + window_start - row["window_start"]
    cached["num_near"] = np.maximum(chunk_start - window_start, 0)

    chunk, first_near = tiles["chunk"], np.maximum(window_start, chunk_start)
    chunk["first_initial"] = start + row["chunk_from"]
    chunk["num_initial"] = np.maximum(num_initial - chunk_start, 0)
    chunk["first_far"] = start + row["chunk_far_from"] + cuts.rank_split - row["rank_split"]
    chunk["num_far"] = cuts.rank_end - cuts.rank_split
    chunk["first_near"] = start + row["chunk_from"] + first_near - chunk_start
    chunk["num_near"] = cuts.position + cuts.num_tokens - first_near

    # far separators all stay visible if those that leave the tile's windows have room beside them
    is_sure = cuts.rank_end + cuts.num_tokens <= bound
    for runs in (cached, chunk):
        runs["num_sure"] = np.where(is_sure, runs["num_initial"] + runs["num_far"], 0)
    return tiles
