"""Copy KV rows between slots, in the caches of all layers. Oracle: ops.reference."""

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import CacheTable

# A program moves at most 32 KiB: 64 registers a thread at 4 warps, so a row never spills.
MAX_UNITS_PER_PROGRAM = 4096

_UNIT_DTYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


# lists of slots lie behind each other, on any 8 bytes: no variant may be compiled while serving
@triton.jit(do_not_specialize_on_alignment=["src_ptr", "dst_ptr"])
def spill_kernel(
    cache_ptrs,  # [num_caches] int64: address of cache [num_blocks, num_kv_heads, block_size, ROW]
    src_ptr,  # [num_moves] int64, slot
    dst_ptr,  # [num_moves] int64, slot, negative: skip
    num_heads,
    stride_block,  # all strides in UNITs
    stride_head,
    stride_token,
    stride_row,
    BLOCK_SIZE: tl.constexpr,
    ROW: tl.constexpr,  # UNITs a row
    ROW_POW2: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    UNIT: tl.constexpr,  # integer type that the bytes are copied as
):
    move = tl.program_id(0)
    # int64: slot * stride passes 2**31 on a cache of a few GiB
    src = tl.load(src_ptr + move).to(tl.int64)
    dst = tl.load(dst_ptr + move).to(tl.int64)
    if dst >= 0:
        cache = tl.load(cache_ptrs + tl.program_id(1)).to(tl.pointer_type(UNIT))
        head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        col = tl.arange(0, ROW_POW2)
        # [BLOCK_HEADS, ROW_POW2]
        inside = (head < num_heads)[:, None] & (col < ROW)[None, :]
        offsets = head.to(tl.int64)[:, None] * stride_head + col.to(tl.int64)[None, :] * stride_row
        src_off = src // BLOCK_SIZE * stride_block + src % BLOCK_SIZE * stride_token
        dst_off = dst // BLOCK_SIZE * stride_block + dst % BLOCK_SIZE * stride_token
        row = tl.load(cache + src_off + offsets, mask=inside)
        tl.store(cache + dst_off + offsets, row, mask=inside)


def launch(table: CacheTable, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy rows in every cache; arguments as in :func:`vllm_sepllm.ops.spill`, already checked."""
    if src.numel() == 0:  # a grid of zero programs is an error
        return
    cache, unit = table.caches[0], table.unit_bytes
    _, num_heads, block_size, row = cache.shape
    element = cache.element_size()
    row_units = row * element // unit
    row_pow2 = triton.next_power_of_2(row_units)
    block_heads = max(1, min(triton.next_power_of_2(num_heads), MAX_UNITS_PER_PROGRAM // row_pow2))
    grid = (src.numel(), len(table.caches), triton.cdiv(num_heads, block_heads))
    spill_kernel[grid](
        table.addresses,
        src,
        dst,
        num_heads,
        *(stride * element // unit for stride in cache.stride()[:3]),
        cache.stride(3),  # 1, or in elements because those are the units then
        BLOCK_SIZE=block_size,
        ROW=row_units,
        ROW_POW2=row_pow2,
        BLOCK_HEADS=block_heads,
        UNIT=_UNIT_DTYPES[unit],
    )
