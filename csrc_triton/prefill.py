"""Prefill attention over three sources: compact cache, ring and chunk.

SepLLM (arXiv 2412.12094, section 3). A key is visible to the queries at [its own position, its
``until``). Tables as in policy/keys/tiles.py, lists of keys as in keys.py. Oracle: ops.reference.
"""

import torch
import triton
import triton.language as tl

from vllm_sepllm.kernels.arguments import Logits, PagedCache
from vllm_sepllm.kernels.keys import REQUEST_COLUMNS, cached_parts, chunk_parts, sure_keys
from vllm_sepllm.kernels.tuning import Tuning

_LOG2E = tl.constexpr(1.4426950408889634)
# what tensor cores multiply; the interpreter multiplies float32, as it computes bfloat16 wrongly
_DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _softmax_step(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    k,  # [BLOCK_KEYS, HEAD_POW2]
    v,  # [BLOCK_KEYS, HEAD_POW2]
    is_visible,  # [BLOCK_ROWS, BLOCK_KEYS]; None: all are
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
    factor = scale * _LOG2E
    if USE_SOFT_CAP:
        logits = soft_cap * (2 * tl.sigmoid(2 * scale * logits / soft_cap) - 1)
        factor = _LOG2E
    if is_visible is not None:
        logits = tl.where(is_visible, logits, float("-inf"))
    # the factor is positive: it goes into one multiply-add with the maximum
    new_top = tl.maximum(top, tl.max(logits, 1) * factor)
    finite_top = new_top
    if is_visible is not None:  # a row that has seen no key yet: -inf - -inf would be NaN
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits * factor - finite_top[:, None])
    decay = tl.exp2(top - finite_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _load_keys(
    key,  # [BLOCK_KEYS] entry of the list
    key_ptr,  # of this KV head
    value_ptr,
    place_ptr,  # [num_keys] int32
    stride_block,  # of a block of the cache; of a row of key
    stride_token,  # of a token in its block; of a row of value
    stride_row,
    IS_CACHE: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_POW2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Keys and values [BLOCK_KEYS, HEAD_POW2], and their places."""
    place = tl.load(place_ptr + key)
    # int64: block id * stride_block passes 2**31 on a cache of a few GiB
    if IS_CACHE:
        key_off = (place // BLOCK_SIZE).to(tl.int64) * stride_block
        key_off += (place % BLOCK_SIZE).to(tl.int64) * stride_token
        value_off = key_off
    else:
        key_off = place.to(tl.int64) * stride_block
        value_off = place.to(tl.int64) * stride_token
    col = tl.arange(0, HEAD_POW2)
    elements = col.to(tl.int64)[None, :] * stride_row
    k_ptrs = key_ptr + key_off[:, None] + elements
    v_ptrs = value_ptr + value_off[:, None] + elements
    if HEAD == HEAD_POW2:
        k, v = tl.load(k_ptrs), tl.load(v_ptrs)
    else:
        in_head = (col < HEAD)[None, :]
        k = tl.load(k_ptrs, mask=in_head, other=0.0)
        v = tl.load(v_ptrs, mask=in_head, other=0.0)
    return k.to(DOT_DTYPE), v.to(DOT_DTYPE), place


@triton.jit
def _attend(
    q,  # [BLOCK_ROWS, HEAD_POW2]
    position,  # [BLOCK_ROWS]
    top,
    total,
    acc,
    key_ptr,  # as in _load_keys, and so below
    value_ptr,
    place_ptr,
    until_ptr,  # [num_keys] int32
    first_0,  # the tile reads num_0 entries from first_0 on, then num_1, then num_2
    num_0,
    first_1,
    num_1,
    first_2,
    num_2,
    num_sure,  # how many of these, from the first on, every row of the tile sees
    chunk_start,  # of no meaning for the cache
    scale,
    soft_cap,
    stride_block,
    stride_token,
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
    masked_from = num_sure // BLOCK_KEYS * BLOCK_KEYS
    for start in range(0, masked_from, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        key += tl.where(key < num_0, first_0, first_1 - num_0)
        k, v, _ = _load_keys(
            key, key_ptr, value_ptr, place_ptr, stride_block, stride_token, stride_row,
            IS_CACHE, HEAD, HEAD_POW2, BLOCK_SIZE, DOT_DTYPE,
        )  # fmt: skip
        top, total, acc = _softmax_step(
            q, k, v, None, top, total, acc, scale, soft_cap, USE_SOFT_CAP
        )
    num_keys = num_0 + num_1 + num_2
    for start in range(masked_from, num_keys, BLOCK_KEYS):
        entry = start + tl.arange(0, BLOCK_KEYS)
        # past the end the last key again: memory that was never written may hold NaN
        key = tl.minimum(entry, num_keys - 1)
        after_0 = tl.where(key < num_0 + num_1, first_1 - num_0, first_2 - num_0 - num_1)
        key += tl.where(key < num_0, first_0, after_0)
        k, v, place = _load_keys(
            key, key_ptr, value_ptr, place_ptr, stride_block, stride_token, stride_row,
            IS_CACHE, HEAD, HEAD_POW2, BLOCK_SIZE, DOT_DTYPE,
        )  # fmt: skip
        until = tl.where(entry < num_keys, tl.load(until_ptr + key), 0)
        seen = position[:, None] < until[None, :]
        if not IS_CACHE:
            seen &= (place + chunk_start)[None, :] <= position[:, None]
        top, total, acc = _softmax_step(
            q, k, v, seen, top, total, acc, scale, soft_cap, USE_SOFT_CAP
        )
    return top, total, acc


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
    # later tiles of a chunk read more keys: they start first
    tile_ptr = tiles_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)) * 8
    num_tokens = tl.load(tile_ptr + 3)
    if num_tokens == 0:  # padding of a persistent buffer
        return
    kv_head = tl.program_id(1)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    tile_start = tl.load(tile_ptr + 2)
    row = tl.arange(0, BLOCK_ROWS)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    in_tile = token < num_tokens
    q_off, q_mask = _query_offsets(
        first_row, num_tokens, kv_head, stride_query, GROUP, HEAD, HEAD_POW2, BLOCK_ROWS
    )
    q = tl.load(query_ptr + q_off, mask=q_mask, other=0.0).to(DOT_DTYPE)
    position = tile_start + token
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks_ptr is not None:
        top = tl.load(sinks_ptr + head, mask=in_tile, other=0.0).to(tl.float32) * _LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_ROWS, HEAD_POW2], tl.float32)
    key_scale = scale
    if key_scale_ptr is not None:
        key_scale = scale * tl.load(key_scale_ptr)

    first_0, num_0, first_1, num_1, first_2, num_2 = cached_parts(tile_ptr, requests_ptr, INITIAL)
    cache_head = kv_head.to(tl.int64) * stride_head
    top, total, acc = _attend(
        q, position, top, total, acc, key_cache_ptr + cache_head, value_cache_ptr + cache_head,
        place_ptr, until_ptr, first_0, num_0, first_1, num_1, first_2, num_2,
        sure_keys(tile_ptr, num_0 + num_1, MAX_SEPARATORS), 0, key_scale, soft_cap,
        stride_block, stride_token, stride_row, True, HEAD, HEAD_POW2, BLOCK_SIZE, BLOCK_KEYS,
        USE_SOFT_CAP, DOT_DTYPE,
    )  # fmt: skip
    if value_scale_ptr is not None:  # nothing but the cache is in acc yet
        acc *= tl.load(value_scale_ptr)
    # the tables are read again where they are needed: through the loops they would take registers
    first_0, num_0, first_1, num_1, first_2, num_2 = chunk_parts(tile_ptr, requests_ptr, INITIAL)
    chunk_start = tl.load(requests_ptr + tl.load(tile_ptr) * REQUEST_COLUMNS + 1)
    # the chunk's rows of key and value begin where its first token is
    chunk_off = tl.load(tile_ptr + 1).to(tl.int64) - (tl.load(tile_ptr + 2) - chunk_start)
    top, total, acc = _attend(
        q, position, top, total, acc, key_ptr + chunk_off * stride_key + kv_head * HEAD,
        value_ptr + chunk_off * stride_value + kv_head * HEAD,
        place_ptr, until_ptr, first_0, num_0, first_1, num_1, first_2, num_2,
        sure_keys(tile_ptr, num_0 + num_1, MAX_SEPARATORS), chunk_start, scale, soft_cap,
        stride_key, stride_value, 1, False, HEAD, HEAD_POW2, BLOCK_SIZE, BLOCK_KEYS,
        USE_SOFT_CAP, DOT_DTYPE,
    )  # fmt: skip
    first_row, num_tokens = tl.load(tile_ptr + 1).to(tl.int64), tl.load(tile_ptr + 3)
    out_off, out_mask = _query_offsets(
        first_row, num_tokens, kv_head, stride_out, GROUP, HEAD, HEAD_POW2, BLOCK_ROWS
    )
    # a row past the tile's end may have seen no key
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + out_off, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    policy: tuple[int, int],
    logits: Logits,
    out: torch.Tensor,
    tuning: Tuning,
) -> None:
    """Arguments as in :func:`vllm_sepllm.ops.prefill`, already checked.

    ``tables`` are tiles, requests and lists of keys; ``policy``: initial_tokens, max_separators.
    """
    (tiles, requests, keys), (num_kv_heads, head_size) = tables, key.shape[1:]
    if tiles.shape[0] == 0:  # a grid of zero programs is an error
        return
    is_compiled = isinstance(prefill_kernel, triton.runtime.JITFunction)
    prefill_kernel[(tiles.shape[0], num_kv_heads)](
        query, key, value, cache.key, cache.value, out, tiles, requests, keys[0], keys[1],
        logits.sinks, *(cache.scales or (None, None)), logits.scale, logits.soft_cap,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0), *cache.key.stride(),
        INITIAL=policy[0], MAX_SEPARATORS=policy[1], GROUP=query.shape[1] // num_kv_heads,
        HEAD=head_size, HEAD_POW2=max(16, triton.next_power_of_2(head_size)),  # tl.dot needs 16
        BLOCK_SIZE=cache.key.shape[2], BLOCK_ROWS=tuning.block_rows, BLOCK_KEYS=tuning.block_keys,
        USE_SOFT_CAP=logits.soft_cap > 0,
        DOT_DTYPE=_DOT_DTYPES[query.dtype] if is_compiled else tl.float32,
        num_warps=tuning.num_warps, num_stages=tuning.num_stages,
        enable_fp_fusion=True,  # what the scores are scaled with; Triton 3.10 has it off by default
    )  # fmt: skip
