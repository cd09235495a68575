"""Prefill attention over three sources: compact cache, ring and chunk.

SepLLM (arXiv 2412.12094, section 3). A key is visible to the queries at positions
[its own, its ``until``), so the kernel compares positions and never looks at token kinds. Tables
as in vllm_sepllm.policy.tiles; oracle: vllm_sepllm.reference.
"""

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import Logits, PagedCache
from vllm_sepllm.kernels.keys import NEVER, find_keys, slot_offsets
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
    value_scale,
    soft_cap,
    USE_SOFT_CAP: tl.constexpr,
    USE_VALUE_SCALE: tl.constexpr,
):
    """One block of keys of the online softmax, in float32."""
    # ieee: float32 operands must not be rounded to tf32
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if USE_SOFT_CAP:
        logits = soft_cap * (2 * tl.sigmoid(2 * logits / soft_cap) - 1)
    logits = tl.where(is_visible, logits * _LOG2E, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # a row that has seen no key yet: -inf - -inf would be NaN
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - finite_top[:, None])
    decay = tl.exp2(top - finite_top)
    total = total * decay + tl.sum(weights, 1)
    if USE_VALUE_SCALE:
        weights = weights * value_scale
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _attend_cache(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    query_position,  # [BLOCK_ROWS]
    top,
    total,
    acc,
    key_cache_ptr,  # of this KV head
    value_cache_ptr,
    table_ptr,  # [max_blocks] int32
    separators_ptr,
    until_ptr,
    until_end,
    num_initial,
    first_rank,
    num_ranks,
    window_start,
    chunk_start,
    num_spilled,
    num_separators,
    window,
    scale,
    value_scale,
    soft_cap,
    stride_block,
    stride_token,
    stride_row,
    INITIAL: tl.constexpr,
    MAX_SEPARATORS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    USE_SOFT_CAP: tl.constexpr,
    USE_VALUE_SCALE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """The cached keys: all older than the tile, so ``until`` alone decides."""
    col = tl.arange(0, HEAD_POW2)
    num_keys = num_initial + num_ranks + tl.maximum(chunk_start - window_start, 0)
    for start in range(0, num_keys, BLOCK_KEYS):
        entry = start + tl.arange(0, BLOCK_KEYS)
        index, key_position, until = find_keys(
            entry, 0, num_initial, first_rank, num_ranks, window_start, num_keys, num_spilled,
            num_separators, separators_ptr, until_ptr, until_end, window, MAX_SEPARATORS,
        )  # fmt: skip
        in_keys = entry < num_keys
        slot_off = slot_offsets(
            index, key_position, num_spilled, chunk_start, window, table_ptr, in_keys,
            stride_block, stride_token, INITIAL, MAX_SEPARATORS, BLOCK_SIZE,
        )  # fmt: skip
        # [BLOCK_KEYS, HEAD_POW2]
        offsets = slot_off[:, None] + col.to(tl.int64)[None, :] * stride_row
        kv_mask = in_keys[:, None] & (col < HEAD)[None, :]
        k = tl.load(key_cache_ptr + offsets, mask=kv_mask, other=0.0).to(DOT_DTYPE)
        v = tl.load(value_cache_ptr + offsets, mask=kv_mask, other=0.0).to(DOT_DTYPE)
        seen = query_position[:, None] < until[None, :]
        top, total, acc = _softmax_step(
            q, k, v, seen, top, total, acc, scale, value_scale, soft_cap, USE_SOFT_CAP,
            USE_VALUE_SCALE,
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
    block_table_ptr,  # [num_rows, max_blocks] int32
    tiles_ptr,  # [num_tiles, 8] int32
    requests_ptr,  # [num_requests, 9] int32
    separators_ptr,  # [num_separators] int32
    until_ptr,  # [num_positions] int32
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
    stride_table,
    INITIAL: tl.constexpr,
    MAX_SEPARATORS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a KV head
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    USE_SOFT_CAP: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    tile_ptr = tiles_ptr + tl.program_id(0) * 8
    num_tokens = tl.load(tile_ptr + 3)
    if num_tokens == 0:  # padding of a persistent buffer
        return
    kv_head = tl.program_id(1)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    tile_start = tl.load(tile_ptr + 2)
    window_start = tl.load(tile_ptr + 4)
    rank_start, rank_split = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6)
    rank_end = tl.load(tile_ptr + 7)
    request_ptr = requests_ptr + tl.load(tile_ptr) * 9
    table_ptr = block_table_ptr + tl.load(request_ptr).to(tl.int64) * stride_table
    chunk_start = tl.load(request_ptr + 1)
    window = tl.load(request_ptr + 8)  # a request may have one of its own
    until_end = tl.load(request_ptr + 2) - window
    num_spilled = tl.load(request_ptr + 4)
    separators_ptr += tl.load(request_ptr + 5)
    num_separators = tl.load(request_ptr + 6)
    until_ptr += tl.load(request_ptr + 7)

    row, col = tl.arange(0, BLOCK_ROWS), tl.arange(0, HEAD_POW2)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    in_head, in_tile = (col < HEAD)[None, :], token < num_tokens
    # [BLOCK_ROWS, HEAD_POW2]
    q_mask, q_col = in_tile[:, None] & in_head, (head * HEAD)[:, None] + col[None, :]
    q_row = (first_row + token)[:, None]
    q = tl.load(query_ptr + q_row * stride_query + q_col, mask=q_mask, other=0.0).to(DOT_DTYPE)
    position = tile_start + token
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head, mask=in_tile, other=0.0).to(tl.float32) * _LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_ROWS, HEAD_POW2], tl.float32)
    key_scale, value_scale = scale, 1.0
    if key_scale_ptr is not None:
        key_scale, value_scale = scale * tl.load(key_scale_ptr), tl.load(value_scale_ptr)

    far_initial = tl.minimum(INITIAL, window_start)
    top, total, acc = _attend_cache(
        q, position, top, total, acc, key_cache_ptr + kv_head.to(tl.int64) * stride_head,
        value_cache_ptr + kv_head.to(tl.int64) * stride_head, table_ptr, separators_ptr, until_ptr,
        until_end, tl.minimum(far_initial, chunk_start), rank_start, rank_split - rank_start,
        window_start, chunk_start, num_spilled, num_separators, window, key_scale, value_scale,
        soft_cap, stride_block, stride_token, stride_row, INITIAL, MAX_SEPARATORS, HEAD, HEAD_POW2,
        BLOCK_SIZE, BLOCK_KEYS, USE_SOFT_CAP, value_scale_ptr is not None, DOT_DTYPE,
    )  # fmt: skip
    # chunk keys before the tile, then the tile's own, the only ones that need causality
    key_ptr += kv_head * HEAD + col[None, :]
    value_ptr += kv_head * HEAD + col[None, :]
    num_initial, num_ranks = tl.maximum(far_initial - chunk_start, 0), rank_end - rank_split
    chunk_window = tl.maximum(window_start, chunk_start)
    num_keys = num_initial + num_ranks + tile_start - chunk_window
    for start in range(0, num_keys, BLOCK_KEYS):
        entry = start + tl.arange(0, BLOCK_KEYS)
        _, key_pos, until = find_keys(
            entry, chunk_start, num_initial, rank_split, num_ranks, chunk_window, num_keys,
            num_spilled, num_separators, separators_ptr, until_ptr, until_end, window,
            MAX_SEPARATORS,
        )  # fmt: skip
        kv_row, kv_mask = (first_row + key_pos - tile_start)[:, None], (entry < num_keys)[:, None]
        k = tl.load(key_ptr + kv_row * stride_key, mask=kv_mask & in_head, other=0.0)
        v = tl.load(value_ptr + kv_row * stride_value, mask=kv_mask & in_head, other=0.0)
        top, total, acc = _softmax_step(
            q, k.to(DOT_DTYPE), v.to(DOT_DTYPE), position[:, None] < until[None, :], top, total,
            acc, scale, 1.0, soft_cap, USE_SOFT_CAP, False,
        )  # fmt: skip
    for start in range(0, num_tokens, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        leaves = (key < num_tokens) & (tile_start + key < until_end)
        until = tl.load(until_ptr + tile_start + key, mask=leaves, other=NEVER)
        kv_row, kv_mask = (first_row + key)[:, None], (key < num_tokens)[:, None]
        k = tl.load(key_ptr + kv_row * stride_key, mask=kv_mask & in_head, other=0.0)
        v = tl.load(value_ptr + kv_row * stride_value, mask=kv_mask & in_head, other=0.0)
        seen = (key[None, :] <= token[:, None]) & (position[:, None] < until[None, :])
        top, total, acc = _softmax_step(
            q, k.to(DOT_DTYPE), v.to(DOT_DTYPE), seen, top, total, acc, scale, 1.0, soft_cap,
            USE_SOFT_CAP, False,
        )  # fmt: skip

    acc = acc / tl.where(in_tile, total, 1.0)[:, None]
    tl.store(out_ptr + q_row * stride_out + q_col, acc.to(out_ptr.dtype.element_ty), mask=q_mask)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    policy: tuple[int, int],
    logits: Logits,
    out: torch.Tensor,
    tuning: Tuning,
) -> None:
    """Arguments as in :func:`vllm_sepllm.ops.prefill`, already checked.

    ``tables`` are tiles, requests, separators and until; ``policy`` is initial_tokens and
    max_separators.
    """
    tiles, (num_kv_heads, head_size) = tables[0], key.shape[1:]
    if tiles.shape[0] == 0:  # a grid of zero programs is an error
        return
    is_compiled = isinstance(prefill_kernel, triton.runtime.JITFunction)
    prefill_kernel[(tiles.shape[0], num_kv_heads)](
        query, key, value, cache.key, cache.value, out, cache.block_table, *tables, logits.sinks,
        *(cache.scales or (None, None)), logits.scale, logits.soft_cap, query.stride(0),
        key.stride(0), value.stride(0), out.stride(0), *cache.key.stride(),
        cache.block_table.stride(0), INITIAL=policy[0],
        MAX_SEPARATORS=max(policy[1], 1),  # a modulus; with 0 no separator is ever far
        GROUP=query.shape[1] // num_kv_heads, HEAD=head_size,
        HEAD_POW2=max(16, triton.next_power_of_2(head_size)),  # tl.dot needs 16
        BLOCK_SIZE=cache.key.shape[2], BLOCK_ROWS=tuning.block_rows,
        BLOCK_KEYS=tuning.block_keys, USE_SOFT_CAP=logits.soft_cap > 0,
        DOT_DTYPE=_DOT_DTYPES[query.dtype] if is_compiled else tl.float32,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
    )  # fmt: skip
