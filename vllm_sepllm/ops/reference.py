"""Torch oracles: slow, readable, on any device. Nothing here is fast on purpose."""

from collections.abc import Iterator, Sequence

import torch

from vllm_sepllm.kernels.arguments import KeyLists, Logits, PagedCache
from vllm_sepllm.ops.rotation import KeyRotation
from vllm_sepllm.ops.tables import PrefillMetadata
from vllm_sepllm.policy.keys.columns import REQUEST
from vllm_sepllm.policy.keys.tiles import NEVER
from vllm_sepllm.policy.visibility import Policy


def spill(caches: Sequence[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    """Oracle of :func:`vllm_sepllm.ops.spill`; ``caches`` are [blocks, heads, block_size, row]."""
    for cache in caches:
        block_size = cache.shape[2]
        for source, target in zip(src.tolist(), dst.tolist(), strict=True):
            if target < 0:
                continue
            row = cache[source // block_size, :, source % block_size].clone()
            cache[target // block_size, :, target % block_size] = row


def turn(
    caches: Sequence[torch.Tensor],
    rotation: KeyRotation,
    slots: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    """Oracle of :func:`vllm_sepllm.ops.turn`; ``caches`` are [blocks, heads, block_size, size]."""
    exists = slots >= 0
    for cache in caches:
        block, offset = slots[exists] // cache.shape[2], slots[exists] % cache.shape[2]
        cache[block, :, offset] = rotation.turned(cache[block, :, offset], delta[exists])


def entry_slots(
    entries: torch.Tensor, block_table: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Oracle of :func:`vllm_sepllm.ops.entry_slots`."""
    for index, (row, compact) in enumerate(zip(*entries.tolist(), strict=True)):
        if compact < 0:
            out[index] = -1
        else:
            block_id = int(block_table[row, compact // block_size])
            out[index] = block_id * block_size + compact % block_size


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    block_table: torch.Tensor,
    metadata: PrefillMetadata,
    logits: Logits,
    out: torch.Tensor,
) -> None:
    """Oracle of :func:`vllm_sepllm.ops.prefill`: M1 over the keys a request holds, row by row.

    Reads the tables of blocks and of requests (what they were given, not their lists) and the
    separators, never the tiles. Computes in float32, or in float64 if the queries are.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    key_scale, value_scale = cache.scales or (1.0, 1.0)
    for request in _requests(metadata):
        own = Policy(request["initial_tokens"], request["window"], metadata.bound)
        start, end, first = request["chunk_start"], request["chunk_end"], request["query_start"]
        separators = _separators(request, metadata)
        keys = _keys_of_request(own, start, end, request["num_spilled"], separators)
        compact = torch.tensor([index for _, _, index in keys if index >= 0], dtype=torch.int64)
        rows, blocks = slice(first, first + end - start), block_table[request["table_row"]]
        k = _gather(cache.key, blocks, compact).to(dtype) * float(key_scale)
        v = _gather(cache.value, blocks, compact).to(dtype) * float(value_scale)
        k, v = torch.cat([k, key[rows].to(dtype)]), torch.cat([v, value[rows].to(dtype)])
        visible = _visible(own, start, end, request["num_spilled"], separators, keys)
        result = attend(
            query[rows].to(dtype), k, v, visible.to(query.device), logits.scale, logits.soft_cap,
            logits.sinks,
        )  # fmt: skip
        out[rows] = result.to(out.dtype)


def _requests(metadata: PrefillMetadata) -> Iterator[dict[str, int]]:
    """Column -> number of each row of the table of requests."""
    assert REQUEST.names is not None
    for row in metadata.requests.tolist():
        yield dict(zip(REQUEST.names, row, strict=True))


def _separators(request: dict[str, int], metadata: PrefillMetadata) -> list[int]:
    first, count = request["separators_start"], request["num_separators"]
    listed: list[int] = metadata.separators[first : first + count].tolist()
    return listed


def list_keys(
    metadata: PrefillMetadata, block_table: torch.Tensor, block_size: int, out: KeyLists
) -> None:
    """Oracle of :func:`vllm_sepllm.ops.list_keys`, key by key.

    The parts of a list follow each other, so their columns are never read.
    """
    for request in _requests(metadata):
        start, end = request["chunk_start"], request["chunk_end"]
        if start == end:
            continue
        a, n, bound = request["initial_tokens"], request["window"], max(1, metadata.bound)
        listed = _separators(request, metadata)
        blocks = block_table[request["table_row"]]

        def slot(compact: int, blocks: torch.Tensor = blocks) -> int:
            return int(blocks[compact // block_size]) * block_size + compact % block_size

        def leaves(p: int, end: int = end - n, first: int = request["until_start"]) -> int:
            return int(metadata.until[first + p]) if p < end else NEVER

        found = [(slot(p), NEVER) for p in range(min(a, start))]
        ranked = []
        for rank in range(request["rank_start"], request["rank_end"]):
            index, later = rank - request["num_spilled"], rank - request["num_spilled"] + bound
            last = listed[later] + n if later < len(listed) else NEVER
            if rank >= request["rank_split"]:
                ranked.append((listed[index] - start, last))
            elif index < 0:
                found.append((slot(a + n + rank % bound), last))
            else:
                found.append((slot(a + (listed[index] - a) % n), last))
        ring = range(max(0, start - n + 1), start)
        found += [(slot(p if p < a else a + (p - a) % n), leaves(p)) for p in ring]
        found += ranked + [(p - start, leaves(p)) for p in range(start, end)]
        entries = slice(request["keys_start"], request["keys_start"] + len(found))
        places, untils = zip(*found, strict=True)
        out.place[entries] = torch.tensor(places, dtype=torch.int32)
        out.until[entries] = torch.tensor(untils, dtype=torch.int32)


def _keys_of_request(
    policy: Policy, start: int, end: int, num_spilled: int, separators: list[int]
) -> list[tuple[int, int, int]]:
    """(position, rank, compact index) of each key: cached ones, then the chunk's.

    Position is -1 in the tail, rank -1 where the key is no separator or an initial token, compact
    index -1 for the chunk's own keys.
    """
    a, n = policy.initial_tokens, policy.window
    rank = {position: num_spilled + i for i, position in enumerate(separators)}
    initial = [(p, -1, p) for p in range(min(a, start))]
    s = policy.bound
    tail = [(-1, r, a + n + r % s) for r in range(max(0, num_spilled - s), num_spilled)]
    ring = [(p, rank.get(p, -1), a + (p - a) % n) for p in range(max(a, start - n), start)]
    # position start - n is there for its spill alone: queries may read it only as a separator
    ring = [entry for entry in ring if entry[0] > start - n or entry[1] >= 0]
    chunk = [(p, rank.get(p, -1), -1) for p in range(start, end)]
    return initial + tail + ring + chunk


def _visible(
    policy: Policy,
    start: int,
    end: int,
    num_spilled: int,
    separators: list[int],
    keys: list[tuple[int, int, int]],
) -> torch.Tensor:
    """[num_queries, num_keys] of the rule, bounded extension included."""
    a, n, s = policy.initial_tokens, policy.window, policy.bound
    mask = torch.zeros(end - start, len(keys), dtype=torch.bool)
    for row, i in enumerate(range(start, end)):
        num_far = num_spilled + sum(p <= i - n for p in separators)
        for col, (p, rank, _) in enumerate(keys):
            in_tail = p < 0
            is_near = not in_tail and (p < a or i - p < n)
            is_far_separator = rank >= max(0, num_far - s)
            mask[row, col] = p <= i and (is_near or is_far_separator)
    return mask


def _gather(cache: torch.Tensor, blocks: torch.Tensor, compact: torch.Tensor) -> torch.Tensor:
    """Rows [num_keys, num_kv_heads, head_size] of a paged cache at compact indices."""
    block_size = cache.shape[2]
    # fp8 has no indexing kernel on CPU: float32 holds every fp8 value
    wide = cache.to(torch.float32) if cache.element_size() == 1 else cache
    compact = compact.to(blocks.device)
    return wide[blocks[compact // block_size].long(), :, compact % block_size]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_visible: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense masked attention in the dtype of its arguments.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_keys, num_kv_heads, head_size].
        value: [num_keys, num_kv_heads, head_size].
        is_visible: [num_queries, num_keys].
        scale: factor of the logits.
        soft_cap: c of c * tanh(logits / c); 0: none.
        sinks: [num_heads] logits of a key without value, or None.

    Returns:
        [num_queries, num_heads, head_size].
    """
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", query, k) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits = logits.masked_fill(~is_visible, float("-inf"))
    if sinks is not None:
        extra = sinks.to(logits.dtype)[:, None, None].expand(-1, logits.shape[1], 1)
        weights = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
