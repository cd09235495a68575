"""Where the keys of a query tile are: parts of the prefill kernel.

The cached keys of a tile, or those of its chunk, form one list: initial tokens, then separators
older than the tile's window, then the window. Tables as in vllm_sepllm.policy.tiles.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(2**31 - 1)  # until of a key that stays visible


@triton.jit
def find_keys(
    entry,  # [BLOCK_KEYS] index in the tile's list: initial tokens, far separators, window
    first_initial,
    num_initial,
    first_rank,
    num_ranks,
    first_window,
    num_keys,
    num_spilled,
    num_separators,
    separators_ptr,  # [num_separators] int32, position of rank num_spilled + index
    until_ptr,  # int32, indexed by position
    until_end,  # later positions stay visible throughout the chunk
    window,
    MAX_SEPARATORS: tl.constexpr,
):
    """Rank less num_spilled (negative: in the tail), position and until of each entry."""
    in_window = (entry >= num_initial + num_ranks) & (entry < num_keys)
    is_far = (entry >= num_initial) & (entry < num_initial + num_ranks)
    index = tl.where(is_far, first_rank + entry - num_initial - num_spilled, 0)
    separator = tl.load(separators_ptr + index, mask=is_far & (index >= 0), other=0)
    # a far separator disappears when the one MAX_SEPARATORS ranks later leaves the window
    later = index + MAX_SEPARATORS
    last = tl.load(
        separators_ptr + later, mask=is_far & (later < num_separators), other=NEVER - window
    )
    in_order = first_window + entry - num_initial - num_ranks
    position = tl.where(is_far, separator, first_initial + entry)
    position = tl.where(in_window, in_order, position)
    leaves = in_window & (position < until_end)
    until = tl.load(until_ptr + position, mask=leaves, other=NEVER)
    until = tl.where(is_far, last + window, until)
    # past the list: visible to no query
    return index, position, tl.where(entry < num_keys, until, 0)


@triton.jit
def slot_offsets(
    index,  # [BLOCK_KEYS] rank less num_spilled, negative: in the tail
    position,  # [BLOCK_KEYS]
    num_spilled,
    chunk_start,
    window,
    table_ptr,  # [max_blocks] int32
    in_keys,  # [BLOCK_KEYS]
    stride_block,
    stride_token,
    INITIAL: tl.constexpr,
    MAX_SEPARATORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Offset of each cached key in the paged cache, in elements."""
    # the ring holds [oldest, chunk_start), once around at most: one division for all keys
    oldest = tl.maximum(INITIAL, chunk_start - window)
    ring = (oldest - INITIAL) % window + position - oldest
    ring = INITIAL + tl.where(ring >= window, ring - window, ring)
    ring = tl.where(position < INITIAL, position, ring)
    tail = INITIAL + window + (index + num_spilled) % MAX_SEPARATORS
    compact = tl.where(index < 0, tail, ring)
    # int64: block id * stride_block passes 2**31 on a cache of a few GiB
    block = tl.load(table_ptr + compact // BLOCK_SIZE, mask=in_keys, other=0).to(tl.int64)
    return block * stride_block + (compact % BLOCK_SIZE).to(tl.int64) * stride_token
