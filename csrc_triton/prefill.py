"""Prefill attention over three sources: compact cache, ring and chunk.

SepLLM (arXiv 2412.12094, section 3). A key is visible to the queries at positions
[its own, its ``until``), so the kernel compares positions and never looks at token kinds. Tables
as in vllm_sepllm.policy.tiles, lists of keys as in keys.py; oracle: vllm_sepllm.reference.
"""

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import Logits, PagedCache
from vllm_sepllm.kernels.keys import REQUEST_COLUMNS
from vllm_sepllm.kernels.tuning import Tuning

_LOG2E = tl.constexpr(1.4426950408889634)
# what tensor cores multiply; the interpreter multiplies float32, as it computes bfloat16 wrongly
_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _softmax_step(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    k,  # [BLOCK_KEYS, HEAD_POW2]
    v,  # [BLOCK_KEYS, HEAD_POW2]
    is_visible,  # [BLOCK_ROWS, BLOCK_KEYS]
    top,  # [BLOCK_ROWS] running maximum, base 2
    total,  # [BLOCK_ROWS]
    acc,  # [BLOCK_ROWS, HEAD_POW2]
    scale,
    soft_cap,
    USE_SOFT_CAP: tl.constexpr,
):
    """One block of keys of the online softmax, in float32."""
    # ieee: float32 operands must not be rounded to tf32
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if USE_SOFT_CAP:
        logits *= scale
        logits = soft_cap * _LOG2E * (2 * tl.sigmoid(2 * logits / soft_cap) - 1)
    else:
        logits *= scale * _LOG2E
    logits = tl.where(is_visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # a row that has seen no key yet: -inf - -inf would be NaN
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - finite_top[:, None])
    decay = tl.exp2(top - finite_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _attend(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    position,  # [BLOCK_ROWS]
    chunk_row,  # [BLOCK_ROWS] position less the chunk's start
    top,
    total,
    acc,
    key_ptr,  # of this KV head
    value_ptr,
    place_ptr,  # [num_keys] int32
    until_ptr,  # [num_keys] int32
    first_0,  # the tile reads num_0 entries from first_0 on, then num_1, then num_2
    num_0,
    first_1,
    num_1,
    first_2,
    num_2,
    scale,
    soft_cap,
    stride_block,  # of a block of the cache; of a row of key
    stride_token,  # of a token in its block; of a row of value
    stride_row,
    IS_CACHE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    USE_SOFT_CAP: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """The cached keys of a tile, or those of its chunk, its own included."""
    col = tl.arange(0, HEAD_POW2)
    num_keys = num_0 + num_1 + num_2
    for start in range(0, num_keys, BLOCK_KEYS):
        entry = start + tl.arange(0, BLOCK_KEYS)
        # past the end the last key again: memory that was never written may hold NaN
        key = tl.minimum(entry, num_keys - 1)
        after_0 = tl.where(key < num_0 + num_1, first_1 - num_0, first_2 - num_0 - num_1)
        key += tl.where(key < num_0, first_0, after_0)
        place, until = tl.load(place_ptr + key), tl.load(until_ptr + key)
        until = tl.where(entry < num_keys, until, 0)
        # int64: block id * stride_block passes 2**31 on a cache of a few GiB
        if IS_CACHE:
            key_off = (place // BLOCK_SIZE).to(tl.int64) * stride_block
            key_off += (place % BLOCK_SIZE).to(tl.int64) * stride_token
            value_off = key_off
        else:
            key_off = place.to(tl.int64) * stride_block
            value_off = place.to(tl.int64) * stride_token
        # [BLOCK_KEYS, HEAD_POW2]
        elements = col.to(tl.int64)[None, :] * stride_row
        k_ptrs = key_ptr + key_off[:, None] + elements
        v_ptrs = value_ptr + value_off[:, None] + elements
        if HEAD == HEAD_POW2:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        else:
            in_head = (col < HEAD)[None, :]
            k = tl.load(k_ptrs, mask=in_head, other=0.0)
            v = tl.load(v_ptrs, mask=in_head, other=0.0)
        seen = position[:, None] < until[None, :]
        if not IS_CACHE:
            seen &= place[None, :] <= chunk_row[:, None]
        top, total, acc = _softmax_step(
            q, k.to(DOT_DTYPE), v.to(DOT_DTYPE), seen, top, total, acc, scale, soft_cap,
            USE_SOFT_CAP,
        )  # fmt: skip
    return top, total, acc


@triton.jit
def prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD]
    key_ptr,  # [num_tokens, num_kv_heads, HEAD]
    value_ptr,  # [num_tokens, num_kv_heads, HEAD]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD]
    value_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD]
    out_ptr,  # [num_tokens, num_heads, HEAD]
    tiles_ptr,  # [num_tiles, 8] int32
    requests_ptr,  # [num_requests, REQUEST_COLUMNS] int32
    place_ptr,  # [num_keys] int32
    until_ptr,  # [num_keys] int32
    sinks_ptr,  # [num_heads] or None
    key_scale_ptr,  # [1] float32 or None
    value_scale_ptr,  # [1] float32 or None
    scale,
    soft_cap,
    stride_query,
    stride_key,
    stride_value,
    stride_out,
    stride_block,
    stride_head,
    stride_token,
    stride_row,
    INITIAL: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    USE_SOFT_CAP: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    # later tiles of a chunk read more keys: they start first
    tile_ptr = tiles_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 8
    num_tokens = tl.load(tile_ptr + 3)
    if num_tokens == 0:  # padding of a persistent buffer
        return
    kv_head = tl.program_id(1)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    tile_start = tl.load(tile_ptr + 2)
    window_start = tl.load(tile_ptr + 4)
    rank_start, rank_split = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6)
    rank_end = tl.load(tile_ptr + 7)
    # where the parts of the request's list begin: see keys.py
    request_ptr = requests_ptr + tl.load(tile_ptr) * REQUEST_COLUMNS
    chunk_start, window = tl.load(request_ptr + 1), tl.load(request_ptr + 8)
    list_start = tl.load(request_ptr + 9)
    list_rank_start, list_rank_split = tl.load(request_ptr + 10), tl.load(request_ptr + 11)
    list_rank_end = tl.load(request_ptr + 12)
    list_window_start = tl.maximum(0, chunk_start - window + 1)
    ranks_from = list_start + tl.minimum(INITIAL, chunk_start)
    ring_from = ranks_from + list_rank_split - list_rank_start
    far_from = ring_from + chunk_start - list_window_start
    chunk_from = far_from + list_rank_end - list_rank_split

    row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, HEAD_POW2)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    in_tile = token < num_tokens
    # [BLOCK_ROWS, HEAD_POW2]
    q_mask, q_col = in_tile[:, None] & (col < HEAD)[None, :], (head * HEAD)[:, None] + col[None, :]
    q_row = (first_row + token)[:, None]
    q = tl.load(query_ptr + q_row * stride_query + q_col, mask=q_mask, other=0.0).to(DOT_DTYPE)
    position, chunk_row = tile_start + token, tile_start - chunk_start + token
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head, mask=in_tile, other=0.0).to(tl.float32) * _LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_ROWS, HEAD_POW2], tl.float32)
    key_scale = scale
    if key_scale_ptr is not None:
        key_scale = scale * tl.load(key_scale_ptr)

    far_initial = tl.minimum(INITIAL, window_start)
    cache_head = kv_head.to(tl.int64) * stride_head
    top, total, acc = _attend(
        q, position, chunk_row, top, total, acc, key_cache_ptr + cache_head,
        value_cache_ptr + cache_head, place_ptr, until_ptr,
        list_start, tl.minimum(far_initial, chunk_start),
        ranks_from + rank_start - list_rank_start, rank_split - rank_start,
        ring_from + window_start - list_window_start, tl.maximum(chunk_start - window_start, 0),
        key_scale, soft_cap, stride_block, stride_token, stride_row, True, HEAD, HEAD_POW2,
        BLOCK_SIZE, BLOCK_KEYS, USE_SOFT_CAP, DOT_DTYPE,
    )  # fmt: skip
    if value_scale_ptr is not None:  # nothing but the cache is in acc yet
        acc *= tl.load(value_scale_ptr)
    # the chunk's rows of key and value begin where its first token is
    chunk_off = first_row - (tile_start - chunk_start)
    window_from = tl.maximum(window_start, chunk_start)
    top, total, acc = _attend(
        q, position, chunk_row, top, total, acc, key_ptr + chunk_off * stride_key + kv_head * HEAD,
        value_ptr + chunk_off * stride_value + kv_head * HEAD, place_ptr, until_ptr,
        chunk_from, tl.maximum(far_initial - chunk_start, 0),
        far_from + rank_split - list_rank_split, rank_end - rank_split,
        chunk_from + window_from - chunk_start, tile_start + num_tokens - window_from,
        scale, soft_cap, stride_key, stride_value, 1, False, HEAD, HEAD_POW2,
        BLOCK_SIZE, BLOCK_KEYS, USE_SOFT_CAP, DOT_DTYPE,
    )  # fmt: skip

    acc = acc / tl.where(in_tile, total, 1.0)[:, None]
    tl.store(out_ptr + q_row * stride_out + q_col, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    initial_tokens: int,
    logits: Logits,
    out: torch.Tensor,
    tuning: Tuning,
) -> None:
    """Arguments as in :func:`vllm_sepllm.ops.prefill`, already checked.

    ``tables`` are tiles, requests and the lists of keys.
    """
    (tiles, requests, keys), (num_kv_heads, head_size) = tables, key.shape[1:]
    if tiles.shape[0] == 0:  # a grid of zero programs is an error
        return
    is_compiled = isinstance(prefill_kernel, triton.runtime.JITFunction)
    prefill_kernel[(tiles.shape[0], num_kv_heads)](
        query, key, value, cache.key, cache.value, out, tiles, requests, keys[0], keys[1],
        logits.sinks, *(cache.scales or (None, None)), logits.scale, logits.soft_cap,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0), *cache.key.stride(),
        INITIAL=initial_tokens, GROUP=query.shape[1] // num_kv_heads, HEAD=head_size,
        HEAD_POW2=max(16, triton.next_power_of_2(head_size)),  # tl.dot needs 16
        BLOCK_SIZE=cache.key.shape[2], BLOCK_ROWS=tuning.block_rows,
        BLOCK_KEYS=tuning.block_keys, USE_SOFT_CAP=logits.soft_cap > 0,
        DOT_DTYPE=_DOT_DTYPES[query.dtype] if is_compiled else tl.float32,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip
