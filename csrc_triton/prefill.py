"""Prefill attention over three sources: compact cache, ring and chunk.

SepLLM (arXiv 2412.12094, section 3). A key is visible to the queries at [its own position, its
``until``). Tables as in policy/keys/columns.py, lists of keys as in keys.py. Oracle: ops.reference.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import KeyLists, Logits, PagedCache
from vllm_sepllm.kernels.columns import RUNS, TILE
from vllm_sepllm.kernels.tuning import Tuning

_LOG2E = tl.constexpr(1.4426950408889634)
# what tensor cores multiply; the interpreter multiplies float32, as it computes bfloat16 wrongly
_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class _Sums(NamedTuple):
    """What the online softmax carries from one block of keys to the next, in float32."""

    top: Any  # [BLOCK_ROWS] running maximum, base 2
    total: Any  # [BLOCK_ROWS]
    acc: Any  # [BLOCK_ROWS, HEAD_POW2]


class _Keys(NamedTuple):
    """Keys and values of one KV head: the cache's, or the chunk's as blocks of one token."""

    key_ptr: Any
    value_ptr: Any
    place_ptr: Any  # [num_keys] int32: block * BLOCK_SIZE + offset
    until_ptr: Any  # [num_keys] int32
    stride_key: Any  # of a block
    stride_value: Any  # of a block
    stride_token: Any  # in its block
    stride_element: Any
    BLOCK_SIZE: Any
    chunk_offset: Any  # place of the tile's first query; None: the cache, all its keys are older


@triton.jit
def _softmax_step(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    k,  # [BLOCK_KEYS, HEAD_POW2]
    v,  # [BLOCK_KEYS, HEAD_POW2]
    is_visible,  # [BLOCK_ROWS, BLOCK_KEYS]; None: all are
    sums,  # _Sums
    scale,
    soft_cap,  # None: none
):
    """One block of keys of the online softmax, in float32."""
    # ieee: float32 operands must not be rounded to tf32
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    factor = scale * _LOG2E
    if soft_cap is not None:
        logits = soft_cap * (2 * tl.sigmoid(2 * scale * logits / soft_cap) - 1)
        factor = _LOG2E
    if is_visible is not None:
        logits = tl.where(is_visible, logits, float("-inf"))
    # the factor is positive: it goes into one multiply-add with the maximum
    top = tl.maximum(sums.top, tl.max(logits, 1) * factor)
    finite_top = top
    if is_visible is not None:  # a row that has seen no key yet: -inf - -inf would be NaN
        finite_top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(logits * factor - finite_top[:, None])
    decay = tl.exp2(sums.top - finite_top)
    total = sums.total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, sums.acc * decay[:, None], input_precision="ieee")
    return _Sums(top, total, acc)


@triton.jit
def _load_keys(
    place,  # [BLOCK_KEYS]
    keys,  # _Keys
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Keys and values, both [BLOCK_KEYS, HEAD_POW2] of DTYPE."""
    # int64: block id * stride passes 2**31 on a cache of a few GiB
    block = (place // keys.BLOCK_SIZE).to(tl.int64)
    in_block = (place % keys.BLOCK_SIZE).to(tl.int64) * keys.stride_token
    col = tl.arange(0, HEAD_POW2)
    elements = col.to(tl.int64)[None, :] * keys.stride_element
    k_ptrs = keys.key_ptr + (block * keys.stride_key + in_block)[:, None] + elements
    v_ptrs = keys.value_ptr + (block * keys.stride_value + in_block)[:, None] + elements
    if HEAD == HEAD_POW2:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)
    else:
        in_head = (col < HEAD)[None, :]
        k = tl.load(k_ptrs, mask=in_head, other=0.0)
        v = tl.load(v_ptrs, mask=in_head, other=0.0)
    return k.to(DTYPE), v.to(DTYPE)


@triton.jit
def _attend(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    token,  # [BLOCK_ROWS] index in the tile
    position,  # of the tile's first token
    sums,  # _Sums
    keys,  # _Keys
    runs_ptr,  # of the tile's RUNS of these keys
    scale,
    soft_cap,
    HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The cached keys of a tile, or those of its chunk, its own included."""
    # keys are counted through the three runs; their entries in the lists are that much further
    num_initial = tl.load(runs_ptr + RUNS.num_initial)
    num_before = num_initial + tl.load(runs_ptr + RUNS.num_far)
    num_keys = num_before + tl.load(runs_ptr + RUNS.num_near)
    to_initial = tl.load(runs_ptr + RUNS.first_initial)
    to_far = tl.load(runs_ptr + RUNS.first_far) - num_initial
    to_near = tl.load(runs_ptr + RUNS.first_near) - num_before
    num_sure = tl.load(runs_ptr + RUNS.num_sure)
    masked_from = num_sure // BLOCK_KEYS * BLOCK_KEYS
    for start in range(0, masked_from, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        entry = key + tl.where(key < num_initial, to_initial, to_far)
        place = tl.load(keys.place_ptr + entry)
        k, v = _load_keys(place, keys, HEAD, q.shape[1], q.dtype)
        sums = _softmax_step(q, k, v, None, sums, scale, soft_cap)
    for start in range(masked_from, num_keys, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        # past the end the last key again: memory that was never written may hold NaN
        entry = tl.minimum(key, num_keys - 1)
        to_entry = tl.where(entry < num_before, to_far, to_near)
        entry += tl.where(entry < num_initial, to_initial, to_entry)
        place = tl.load(keys.place_ptr + entry)
        k, v = _load_keys(place, keys, HEAD, q.shape[1], q.dtype)
        until = tl.where(key < num_keys, tl.load(keys.until_ptr + entry), 0)
        seen = (position + token)[:, None] < until[None, :]
        if keys.chunk_offset is not None:
            seen &= place[None, :] <= (keys.chunk_offset + token)[:, None]
        sums = _softmax_step(q, k, v, seen, sums, scale, soft_cap)
    return sums


@triton.jit
def _query_offsets(
    first_row,  # int64, of the tile's first token
    num_tokens,
    kv_head,
    stride,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Where the tile's queries lie, and which of them there are; both [BLOCK_ROWS, HEAD_POW2]."""
    row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, HEAD_POW2)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    offsets = ((first_row + token) * stride + head * HEAD)[:, None] + col[None, :]
    return offsets, (token < num_tokens)[:, None] & (col < HEAD)[None, :]


@triton.jit
def prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD]
    key_ptr,  # [num_tokens, num_kv_heads, HEAD]
    value_ptr,  # [num_tokens, num_kv_heads, HEAD]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD]
    value_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD]
    out_ptr,  # [num_tokens, num_heads, HEAD]
    tiles_ptr,  # [num_tiles, TILE.num_columns] int32
    place_ptr,  # [num_keys] int32
    until_ptr,  # [num_keys] int32
    sinks_ptr,  # [num_heads] or None
    key_scale_ptr,  # [1] float32 or None
    value_scale_ptr,  # [1] float32 or None
    scale,
    soft_cap,  # None: none
    stride_query,
    stride_key,
    stride_value,
    stride_out,
    stride_block,
    stride_head,
    stride_token,
    stride_row,
    GROUP: tl.constexpr,  # query heads a KV head
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    # later tiles of a chunk read more keys: they start first
    tile_ptr = tiles_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE.num_columns
    num_tokens = tl.load(tile_ptr + TILE.num_tokens)
    if num_tokens == 0:  # padding of a persistent buffer
        return
    kv_head = tl.program_id(1)
    first_row = tl.load(tile_ptr + TILE.query_start).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    in_tile = token < num_tokens
    q_off, q_mask = _query_offsets(
        first_row, num_tokens, kv_head, stride_query, GROUP, HEAD, HEAD_POW2, BLOCK_ROWS
    )
    q = tl.load(query_ptr + q_off, mask=q_mask, other=0.0).to(DOT_DTYPE)
    position = tl.load(tile_ptr + TILE.position)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head, mask=in_tile, other=0.0).to(tl.float32) * _LOG2E
        total += 1.0
    sums = _Sums(top, total, tl.zeros([BLOCK_ROWS, HEAD_POW2], tl.float32))
    key_scale = scale
    if key_scale_ptr is not None:
        key_scale = scale * tl.load(key_scale_ptr)

    cache_off = kv_head.to(tl.int64) * stride_head
    cached = _Keys(
        key_cache_ptr + cache_off, value_cache_ptr + cache_off, place_ptr, until_ptr,
        stride_block, stride_block, stride_token, stride_row, BLOCK_SIZE, None,
    )  # fmt: skip
    sums = _attend(
        q, token, position, sums, cached, tile_ptr + TILE.cached, key_scale, soft_cap,
        HEAD, BLOCK_KEYS,
    )  # fmt: skip
    if value_scale_ptr is not None:  # nothing but the cache is in acc yet
        sums = _Sums(sums.top, sums.total, sums.acc * tl.load(value_scale_ptr))
    chunk_row = tl.load(tile_ptr + TILE.chunk_query_start).to(tl.int64)
    chunk = _Keys(
        key_ptr + chunk_row * stride_key + kv_head * HEAD,
        value_ptr + chunk_row * stride_value + kv_head * HEAD,
        place_ptr, until_ptr, stride_key, stride_value, 0, 1, 1,
        tl.load(tile_ptr + TILE.chunk_offset),
    )  # fmt: skip
    sums = _attend(
        q, token, position, sums, chunk, tile_ptr + TILE.chunk, scale, soft_cap,
        HEAD, BLOCK_KEYS,
    )  # fmt: skip
    # volatile: read again, or the first ones would take registers through the loops
    first_row = tl.load(tile_ptr + TILE.query_start, volatile=True).to(tl.int64)
    num_tokens = tl.load(tile_ptr + TILE.num_tokens, volatile=True)
    out_off, out_mask = _query_offsets(
        first_row, num_tokens, kv_head, stride_out, GROUP, HEAD, HEAD_POW2, BLOCK_ROWS
    )
    # a row past the tile's end may have seen no key
    out = sums.acc / tl.where(sums.total == 0.0, 1.0, sums.total)[:, None]
    tl.store(out_ptr + out_off, out.to(out_ptr.dtype.element_ty), mask=out_mask)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    tiles: torch.Tensor,
    keys: KeyLists,
    logits: Logits,
    out: torch.Tensor,
    tuning: Tuning,
) -> None:
    """Arguments as in :func:`vllm_sepllm.ops.prefill`, already checked.

    ``tiles`` and ``keys`` are of the step's :class:`vllm_sepllm.ops.PrefillMetadata`.
    """
    num_kv_heads, head_size = key.shape[1:]
    if tiles.shape[0] == 0:  # a grid of zero programs is an error
        return
    key_scale, value_scale = cache.scales or (None, None)
    is_compiled = isinstance(prefill_kernel, triton.runtime.JITFunction)
    prefill_kernel[(tiles.shape[0], num_kv_heads)](
        query, key, value, cache.key, cache.value, out, tiles, keys.place, keys.until,
        logits.sinks, key_scale, value_scale, logits.scale, logits.soft_cap or None,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0), *cache.key.stride(),
        GROUP=query.shape[1] // num_kv_heads,
        HEAD=head_size, HEAD_POW2=max(16, triton.next_power_of_2(head_size)),  # tl.dot needs 16
        BLOCK_SIZE=cache.key.shape[2], BLOCK_ROWS=tuning.block_rows, BLOCK_KEYS=tuning.block_keys,
        DOT_DTYPE=_DOT_DTYPES[query.dtype] if is_compiled else tl.float32,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
        enable_fp_fusion=True,  # what the scores are scaled with; Triton 3.10 has it off by default
    )  # fmt: skip
