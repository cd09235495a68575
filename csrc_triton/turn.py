"""Rotate keys to other positions, in the caches of all layers. Oracle: ops.reference.

RoPE makes a key's move one rotation by the difference of its positions (RoFormer,
arXiv:2104.09864): no activation is needed, and each key is read and written once.
"""

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import CacheTable

# A program turns at most 2048 pairs, 16 a thread at 4 warps: elements, angles and products fit the
# registers of every target (bench.compile).
MAX_PAIRS_PER_PROGRAM = 2048

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


# lists of slots lie behind each other, on any 8 bytes: no variant may be compiled while serving
@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "delta_ptr"])
def turn_kernel(
    cache_ptrs,  # [num_caches] int64: address of keys [num_blocks, num_kv_heads, block_size, HEAD]
    slots_ptr,  # [num_entries] int64, negative: skip
    delta_ptr,  # [num_entries] int64, new position less old one
    cos_ptr,  # [num_positions, NUM_PAIRS] float32, of the positions from 0
    sin_ptr,  # like cos
    num_heads,
    stride_block,  # all strides in elements
    stride_head,
    stride_token,
    stride_row,
    BLOCK_SIZE: tl.constexpr,
    NUM_PAIRS: tl.constexpr,  # rotated elements are the first 2 * NUM_PAIRS of a head
    PAIRS_POW2: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    IS_NEOX: tl.constexpr,  # pairs are the halves of the rotated part, not its neighbours
    DTYPE: tl.constexpr,  # of the caches
):
    entry = tl.program_id(0)
    # int64: slot * stride passes 2**31 on a cache of a few GiB
    slot = tl.load(slots_ptr + entry).to(tl.int64)
    delta = tl.load(delta_ptr + entry).to(tl.int64)
    if slot >= 0:
        keys = tl.load(cache_ptrs + tl.program_id(1)).to(tl.pointer_type(DTYPE))
        head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        pair = tl.arange(0, PAIRS_POW2)
        exists = pair < NUM_PAIRS
        angle = tl.abs(delta) * NUM_PAIRS + pair
        cos = tl.load(cos_ptr + angle, mask=exists, other=1.0)[None, :]
        sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)[None, :]
        sin = tl.where(delta < 0, -sin, sin)
        one, other = (pair, pair + NUM_PAIRS) if IS_NEOX else (2 * pair, 2 * pair + 1)
        # [BLOCK_HEADS, PAIRS_POW2]
        inside = (head < num_heads)[:, None] & exists[None, :]
        keys += slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token
        keys += head.to(tl.int64)[:, None] * stride_head
        one_ptr = keys + one.to(tl.int64)[None, :] * stride_row
        other_ptr = keys + other.to(tl.int64)[None, :] * stride_row
        # float32 before any product: the interpreter multiplies bfloat16 as integers
        x = tl.load(one_ptr, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(other_ptr, mask=inside, other=0.0).to(tl.float32)
        tl.store(one_ptr, (x * cos - y * sin).to(DTYPE), mask=inside)
        tl.store(other_ptr, (y * cos + x * sin).to(DTYPE), mask=inside)


def launch(
    table: CacheTable,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    delta: torch.Tensor,
    *,
    is_neox_style: bool,
) -> None:
    """Turn keys in every cache; arguments as in :func:`vllm_sepllm.ops.turn`, already checked."""
    if slots.numel() == 0:  # a grid of zero programs is an error
        return
    cache, num_pairs = table.caches[0], cos.shape[1]
    _, num_heads, block_size, _ = cache.shape
    pairs_pow2 = triton.next_power_of_2(num_pairs)
    block_heads = min(triton.next_power_of_2(num_heads), MAX_PAIRS_PER_PROGRAM // pairs_pow2)
    grid = (slots.numel(), len(table.caches), triton.cdiv(num_heads, block_heads))
    turn_kernel[grid](
        table.addresses,
        slots,
        delta,
        cos,
        sin,
        num_heads,
        *cache.stride(),
        BLOCK_SIZE=block_size,
        NUM_PAIRS=num_pairs,
        PAIRS_POW2=pairs_pow2,
        BLOCK_HEADS=block_heads,
        IS_NEOX=is_neox_style,
        DTYPE=_DTYPES[cache.dtype],
    )
