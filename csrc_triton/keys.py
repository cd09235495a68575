"""List the keys that the tiles of each prefill chunk read. Oracle: ops.reference.

All layers, heads and tiles of a step read the same lists, so where a key lies and until when it is
visible is worked out once a step, and the prefill kernel is left with two loads a key.
"""

import torch
import triton
import triton.language as tl

NEVER = tl.constexpr(2**31 - 1)  # until of a key that stays visible
REQUEST_COLUMNS = tl.constexpr(13)
# entries a program: a few integers each
_BLOCK = 256


@triton.jit
def list_parts(
    request_ptr,  # of the request's row
    INITIAL: tl.constexpr,
):
    """Where in a request's list its parts begin, but for the initial tokens, which are first.

    Far separators of the cache, ring, far separators of the chunk, chunk.
    """
    chunk_start, window = tl.load(request_ptr + 1), tl.load(request_ptr + 8)
    rank_start, rank_split = tl.load(request_ptr + 10), tl.load(request_ptr + 11)
    ranks_from = tl.minimum(INITIAL, chunk_start)
    ring_from = ranks_from + rank_split - rank_start
    far_from = ring_from + chunk_start - tl.maximum(0, chunk_start - window + 1)
    return ranks_from, ring_from, far_from, far_from + tl.load(request_ptr + 12) - rank_split


@triton.jit
def sure_keys(
    tile_ptr,  # of the tile's row
    num_early,
    MAX_SEPARATORS: tl.constexpr,
):
    """How many of ``num_early`` keys before the tile's windows all its rows see: all or none.

    None if so many separators may leave the window by the last row that one has to make place.
    """
    num_left = tl.load(tile_ptr + 7) + tl.load(tile_ptr + 3)
    return tl.where(num_left <= MAX_SEPARATORS, num_early, 0)


@triton.jit
def cached_parts(
    tile_ptr,
    requests_ptr,
    INITIAL: tl.constexpr,
):
    """What a tile reads of the cache, as three runs (first, length) of the lists."""
    request_ptr = requests_ptr + tl.load(tile_ptr) * REQUEST_COLUMNS
    window_start = tl.load(tile_ptr + 4)
    rank_start, rank_split = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6)
    chunk_start, list_start = tl.load(request_ptr + 1), tl.load(request_ptr + 9)
    ranks_from, ring_from, _, _ = list_parts(request_ptr, INITIAL)
    num_initial = tl.minimum(tl.minimum(INITIAL, window_start), chunk_start)
    first_far = ranks_from + rank_start - tl.load(request_ptr + 10)
    list_window_start = tl.maximum(0, chunk_start - tl.load(request_ptr + 8) + 1)
    first_ring, num_ring = ring_from + window_start - list_window_start, chunk_start - window_start
    return (
        list_start, num_initial, list_start + first_far, rank_split - rank_start,
        list_start + first_ring, tl.maximum(num_ring, 0),
    )  # fmt: skip


@triton.jit
def chunk_parts(
    tile_ptr,
    requests_ptr,
    INITIAL: tl.constexpr,
):
    """What it reads of its chunk."""
    request_ptr = requests_ptr + tl.load(tile_ptr) * REQUEST_COLUMNS
    window_start = tl.load(tile_ptr + 4)
    tile_end = tl.load(tile_ptr + 2) + tl.load(tile_ptr + 3)
    rank_split, rank_end = tl.load(tile_ptr + 6), tl.load(tile_ptr + 7)
    chunk_start, list_start = tl.load(request_ptr + 1), tl.load(request_ptr + 9)
    _, _, far_from, chunk_from = list_parts(request_ptr, INITIAL)
    num_initial = tl.maximum(tl.minimum(INITIAL, window_start) - chunk_start, 0)
    first_far = far_from + rank_split - tl.load(request_ptr + 11)
    first = tl.maximum(window_start, chunk_start)
    return (
        list_start + chunk_from, num_initial, list_start + first_far, rank_end - rank_split,
        list_start + chunk_from + first - chunk_start, tile_end - first,
    )  # fmt: skip


@triton.jit
def keys_kernel(
    requests_ptr,  # [num_requests, REQUEST_COLUMNS] int32
    separators_ptr,  # [num_separators] int32
    until_ptr,  # [num_positions] int32
    block_table_ptr,  # [num_rows, max_blocks] int32
    place_out_ptr,  # [num_keys] int32: slot of a cached key, row in its chunk of the others
    until_out_ptr,  # [num_keys] int32
    stride_table,
    INITIAL: tl.constexpr,
    MAX_SEPARATORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Initial tokens, cached far separators, ring; far separators of the chunk, the chunk."""
    request_ptr = requests_ptr + tl.program_id(0) * REQUEST_COLUMNS
    table_ptr = block_table_ptr + tl.load(request_ptr).to(tl.int64) * stride_table
    chunk_start = tl.load(request_ptr + 1)
    chunk_end = tl.load(request_ptr + 2)
    if chunk_start == chunk_end:  # no tile, no list
        return
    num_spilled = tl.load(request_ptr + 4)
    separators_ptr += tl.load(request_ptr + 5)
    num_separators = tl.load(request_ptr + 6)
    until_ptr += tl.load(request_ptr + 7)
    window = tl.load(request_ptr + 8)
    first_key = tl.load(request_ptr + 9)
    rank_start, rank_split = tl.load(request_ptr + 10), tl.load(request_ptr + 11)

    window_start = tl.maximum(0, chunk_start - window + 1)
    until_end = chunk_end - window
    ranks_from, ring_from, far_from, chunk_from = list_parts(request_ptr, INITIAL)
    num_keys = chunk_from + chunk_end - chunk_start
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_keys = entry < num_keys
    is_cached = entry < far_from
    is_far = ((entry >= ranks_from) & (entry < ring_from)) | (~is_cached & (entry < chunk_from))

    rank = tl.where(is_cached, rank_start + entry - ranks_from, rank_split + entry - far_from)
    index = rank - num_spilled  # negative: in the tail
    separator = tl.load(separators_ptr + index, mask=is_far & (index >= 0), other=0)
    # a far separator disappears when the one MAX_SEPARATORS ranks later leaves the window
    later = index + MAX_SEPARATORS
    is_known = is_far & (later >= 0) & (later < num_separators)
    last = tl.load(separators_ptr + later, mask=is_known, other=NEVER - window)
    position = tl.where(
        is_cached, window_start + entry - ring_from, entry - chunk_from + chunk_start
    )
    position = tl.where(entry < ranks_from, entry, position)
    position = tl.where(is_far, separator, position)
    leaves = in_keys & ~is_far & (entry >= ranks_from) & (position < until_end)
    until = tl.load(until_ptr + position, mask=leaves, other=NEVER)
    until = tl.where(is_far, last + window, until)

    # the ring holds [oldest, chunk_start), once around at most: one division for all keys
    oldest = tl.maximum(INITIAL, chunk_start - window)
    ring = (oldest - INITIAL) % window + position - oldest
    ring = INITIAL + tl.where(ring >= window, ring - window, ring)
    compact = tl.where(position < INITIAL, position, ring)
    tail = INITIAL + window + rank % MAX_SEPARATORS
    compact = tl.where(is_far & (index < 0), tail, compact)
    block = tl.load(table_ptr + compact // BLOCK_SIZE, mask=is_cached, other=0)
    slot = block * BLOCK_SIZE + compact % BLOCK_SIZE
    place = tl.where(is_cached, slot, position - chunk_start)
    tl.store(place_out_ptr + first_key + entry, place, mask=in_keys)
    tl.store(until_out_ptr + first_key + entry, until, mask=in_keys)


def launch(
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    block_size: int,
    most_keys: int,
    policy: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """Arguments as in :func:`vllm_sepllm.ops.list_keys`, already checked.

    ``tables`` are requests, separators and until; ``most_keys`` is the longest list; ``policy`` is
    initial_tokens and max_separators.
    """
    requests = tables[0]
    if most_keys == 0:  # a grid of zero programs is an error
        return
    keys_kernel[(requests.shape[0], triton.cdiv(most_keys, _BLOCK))](
        *tables, block_table, out[0], out[1], block_table.stride(0), INITIAL=policy[0],
        MAX_SEPARATORS=max(policy[1], 1),  # a modulus; with 0 no separator is ever far
        BLOCK_SIZE=block_size, BLOCK=_BLOCK,
    )  # fmt: skip
