"""List the keys that the tiles of each prefill chunk read. Oracle: ops.reference.

All layers, heads and tiles of a step read the same lists, so where a key lies and until when it is
visible is worked out once a step, and the prefill kernel is left with two loads a key.
"""

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import KeyLists
from vllm_sepllm.kernels.columns import REQUEST

NEVER = tl.constexpr(2**31 - 1)  # until of a key that stays visible
# entries a program: a few integers each
_BLOCK = 256


@triton.jit
def keys_kernel(
    requests_ptr,  # [num_requests, REQUEST.num_columns] int32
    separators_ptr,  # [num_separators] int32
    until_ptr,  # [num_positions] int32
    block_table_ptr,  # [num_rows, max_blocks] int32
    place_out_ptr,  # [num_keys] int32: slot of a cached key, row in its chunk of the others
    until_out_ptr,  # [num_keys] int32
    stride_table,
    MAX_SEPARATORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request_ptr = requests_ptr + tl.program_id(0) * REQUEST.num_columns
    num_keys = tl.load(request_ptr + REQUEST.num_keys)
    if num_keys == 0:  # an empty chunk
        return
    initial_tokens = tl.load(request_ptr + REQUEST.initial_tokens)
    window = tl.load(request_ptr + REQUEST.window)
    chunk_start = tl.load(request_ptr + REQUEST.chunk_start)
    far_from = tl.load(request_ptr + REQUEST.far_from)
    window_from = tl.load(request_ptr + REQUEST.window_from)
    chunk_far_from = tl.load(request_ptr + REQUEST.chunk_far_from)
    chunk_from = tl.load(request_ptr + REQUEST.chunk_from)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_keys = entry < num_keys
    is_cached = entry < chunk_far_from
    is_cached_far = (entry >= far_from) & (entry < window_from)
    is_far = is_cached_far | (~is_cached & (entry < chunk_from))

    cached_rank = tl.load(request_ptr + REQUEST.rank_start) + entry - far_from
    chunk_rank = tl.load(request_ptr + REQUEST.rank_split) + entry - chunk_far_from
    rank = tl.where(is_cached, cached_rank, chunk_rank)
    index = rank - tl.load(request_ptr + REQUEST.num_spilled)  # negative: in the tail
    separators_ptr += tl.load(request_ptr + REQUEST.separators_start)
    separator = tl.load(separators_ptr + index, mask=is_far & (index >= 0), other=0)
    # a far separator disappears when the one MAX_SEPARATORS ranks later leaves the window
    later = index + MAX_SEPARATORS
    num_separators = tl.load(request_ptr + REQUEST.num_separators)
    is_known = is_far & (later >= 0) & (later < num_separators)
    last = tl.load(separators_ptr + later, mask=is_known, other=NEVER - window)

    cached_position = tl.load(request_ptr + REQUEST.window_start) + entry - window_from
    position = tl.where(is_cached, cached_position, chunk_start + entry - chunk_from)
    position = tl.where(entry < far_from, entry, position)
    position = tl.where(is_far, separator, position)
    until_ptr += tl.load(request_ptr + REQUEST.until_start)
    until_end = tl.load(request_ptr + REQUEST.chunk_end) - window
    leaves = in_keys & ~is_far & (entry >= far_from) & (position < until_end)
    until = tl.load(until_ptr + position, mask=leaves, other=NEVER)
    until = tl.where(is_far, last + window, until)

    # the ring holds [oldest, chunk_start), once around at most: one division for all keys
    oldest = tl.maximum(initial_tokens, chunk_start - window)
    ring = (oldest - initial_tokens) % window + position - oldest
    ring = initial_tokens + tl.where(ring >= window, ring - window, ring)
    compact = tl.where(position < initial_tokens, position, ring)
    tail = initial_tokens + window + rank % MAX_SEPARATORS
    compact = tl.where(is_far & (index < 0), tail, compact)
    table_row = tl.load(request_ptr + REQUEST.table_row).to(tl.int64)
    block_ptr = block_table_ptr + table_row * stride_table + compact // BLOCK_SIZE
    block = tl.load(block_ptr, mask=is_cached, other=0)
    slot = block * BLOCK_SIZE + compact % BLOCK_SIZE
    place = tl.where(is_cached, slot, position - chunk_start)
    out = tl.load(request_ptr + REQUEST.keys_start) + entry
    tl.store(place_out_ptr + out, place, mask=in_keys)
    tl.store(until_out_ptr + out, until, mask=in_keys)


def launch(
    requests: torch.Tensor,
    separators: torch.Tensor,
    until: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    max_separators: int,
    longest: int,
    out: KeyLists,
) -> None:
    """Fill ``out``; arguments as in :func:`vllm_sepllm.ops.list_keys`, already checked.

    ``longest`` is the length of the longest list.
    """
    if longest == 0:  # a grid of zero programs is an error
        return
    keys_kernel[(requests.shape[0], triton.cdiv(longest, _BLOCK))](
        requests,
        separators,
        until,
        block_table,
        out.place,
        out.until,
        block_table.stride(0),
        MAX_SEPARATORS=max(max_separators, 1),  # a modulus; with 0 no separator is ever far
        BLOCK_SIZE=block_size,
        BLOCK=_BLOCK,
    )
