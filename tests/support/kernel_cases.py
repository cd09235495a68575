"""Random prefill steps: whole prompts, the compact cache they leave, and their dense attention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vllm_sepllm import ops
from vllm_sepllm.ops import reference
from vllm_sepllm.policy.keys.tiles import PrefillRequests, plan_tiles
from vllm_sepllm.policy.visibility import AnyPolicy, BatchPolicy, Policy, visible_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Shape:
    """What a case looks like apart from its policy and prompts."""

    num_kv_heads: int = 1
    group: int = 2
    head_size: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: as dtype
    layout: str = "bhtd"  # order of block, head, token, element in memory
    tile_tokens: int = 8


@dataclass(frozen=True)
class Case:
    """A step on DEVICE; ``keys`` and ``values`` are whole prompts as the queries should see."""

    policy: BatchPolicy
    prompts: list[tuple[list[bool], int]]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: ops.PagedCache
    block_table: torch.Tensor
    metadata: ops.PrefillMetadata
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def run(self, out_dtype: torch.dtype | None = None, **options) -> torch.Tensor:
        """[num_tokens, num_heads, head_size]; rows that the operation leaves alone are NaN."""
        return self._run(ops.prefill, out_dtype, **options)

    def run_reference(self) -> torch.Tensor:
        """The same by the oracle."""
        return self._run(partial(reference.prefill, block_table=self.block_table))

    def _run(
        self, prefill: Callable[..., None], out_dtype: torch.dtype | None = None, **options
    ) -> torch.Tensor:
        out = torch.full_like(self.query, float("nan"), dtype=out_dtype or self.query.dtype)
        logits = ops.Logits(**({"scale": self.query.shape[2] ** -0.5} | options))
        kv = self.key, self.value, self.cache
        prefill(self.query, *kv, metadata=self.metadata, logits=logits, out=out)
        return out

    def dense(self, dtype: torch.dtype, **options) -> torch.Tensor:
        """The rule's attention over whole prompts in ``dtype``, on the CPU."""
        scale = self.query.shape[2] ** -0.5
        rows, first = [], 0
        for row, (flags, start) in enumerate(self.prompts):
            key, value = self.keys[row], self.values[row]
            mask = visible_mask(self.policy.of_row(row), np.array(flags, dtype=bool))[start:]
            query = self.query[first : first + len(flags) - start].cpu().to(dtype)
            kv = key.to(dtype), value.to(dtype)
            rows.append(reference.attend(query, *kv, torch.from_numpy(mask), scale, **options))
            first += len(flags) - start
        return torch.cat(rows)


def compact_positions(policy: Policy, is_separator: list[bool], num_tokens: int) -> dict[int, int]:
    """Compact index -> position after ``num_tokens`` tokens, by writing them one at a time."""
    a, n, s = policy.initial_tokens, policy.window, policy.max_separators
    held, num_spilled = {}, 0
    for i in range(num_tokens):
        if i - n >= a and is_separator[i - n]:
            if s is None or s > 0:
                held[a + n + (num_spilled if s is None else num_spilled % s)] = i - n
            num_spilled += 1
        held[i if i < a else a + (i - a) % n] = i
    return held


def make_case(
    policy: AnyPolicy, prompts: list[tuple[list[bool], int]], shape: Shape, seed: int = 0
) -> Case:
    """Prompts are (is_separator, chunk_start); unused slots and padding rows hold NaN."""
    if isinstance(policy, Policy):
        policy = BatchPolicy.of([policy] * len(prompts), policy)
    gen = torch.Generator().manual_seed(seed)
    heads, size = shape.num_kv_heads, shape.head_size

    def randn(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, generator=gen).to(shape.dtype)

    keys = [randn(len(flags), heads, size) for flags, _ in prompts]
    values = [randn(len(flags), heads, size) for flags, _ in prompts]
    cache, table = _fill_cache(policy, prompts, shape, keys, values, gen)
    starts = [start for _, start in prompts]
    key = torch.cat([whole[start:] for whole, start in zip(keys, starts, strict=True)])
    value = torch.cat([whole[start:] for whole, start in zip(values, starts, strict=True)])
    query = randn(len(key), heads * shape.group, size)
    parts = (part.to(DEVICE) for part in (query, key, value))
    # a GPU has tiles of its own for each dtype
    most = ops.prefill_tile_tokens(heads * shape.group, heads, size, shape.dtype)
    metadata = _metadata(policy, prompts, min(shape.tile_tokens, most))
    metadata = ops.list_keys(metadata, table, shape.block_size)
    return Case(policy, prompts, *parts, cache, table, metadata, keys, values)


def _fill_cache(policy, prompts, shape, keys, values, gen) -> tuple[ops.PagedCache, torch.Tensor]:
    """Random blocks; where the cache is fp8, ``keys`` and ``values`` become what fp8 kept."""
    held = [
        compact_positions(policy.of_row(row), flags, start)
        for row, (flags, start) in enumerate(prompts)
    ]
    max_blocks = 1 + max(max(h, default=0) for h in held) // shape.block_size
    num_blocks = len(prompts) * max_blocks + 2
    table = torch.randperm(num_blocks, generator=gen)[: len(prompts) * max_blocks]
    table = table.view(len(prompts), max_blocks).to(torch.int32)
    caches = _empty_caches(num_blocks, shape)
    is_fp8 = shape.cache_dtype is not None
    scales = (torch.tensor(0.5), torch.tensor(0.25)) if is_fp8 else (1.0, 1.0)
    for row, indices in enumerate(held):
        for index, position in indices.items():
            block, offset = int(table[row, index // shape.block_size]), index % shape.block_size
            for cache, whole, scale in zip(caches, (keys[row], values[row]), scales, strict=True):
                stored = (whole[position] / scale).to(cache.dtype)
                cache[block, :, offset] = stored
                whole[position] = (stored.to(torch.float32) * scale if is_fp8 else stored).to(
                    whole.dtype
                )
    key_cache, value_cache = (cache.to(DEVICE) for cache in caches)
    device_scales = tuple(scale.to(DEVICE) for scale in scales) if is_fp8 else None
    return ops.PagedCache(key_cache, value_cache, device_scales), table.to(DEVICE)


def _empty_caches(num_blocks: int, shape: Shape) -> list[torch.Tensor]:
    """Key and value cache [block, head, token, element], NaN (0x7f in fp8), in a memory layout."""
    sizes = {"b": num_blocks, "h": shape.num_kv_heads, "t": shape.block_size, "d": shape.head_size}
    caches = []
    for _ in range(2):
        memory = torch.full([sizes[dim] for dim in shape.layout], float("nan"))
        memory = memory.to(shape.cache_dtype or shape.dtype)
        caches.append(memory.permute([shape.layout.index(dim) for dim in "bhtd"]))
    return caches


def _metadata(
    policy: BatchPolicy, prompts: list[tuple[list[bool], int]], tile_tokens: int
) -> ops.PrefillMetadata:
    own = [policy.of_row(row) for row in range(len(prompts))]
    lowest = [
        max(row.initial_tokens, start - row.window)
        for row, (_, start) in zip(own, prompts, strict=True)
    ]
    spilled = [
        sum(flags[row.initial_tokens : low])
        for row, (flags, _), low in zip(own, prompts, lowest, strict=True)
    ]
    listed = [
        np.flatnonzero(flags[low:]) + low for (flags, _), low in zip(prompts, lowest, strict=True)
    ]
    ends = np.array([len(flags) for flags, _ in prompts])
    starts = np.array([start for _, start in prompts])
    requests = PrefillRequests(
        table_row=np.arange(len(prompts)),
        query_start=np.cumsum(ends - starts) - (ends - starts),
        chunk_start=starts,
        chunk_end=ends,
        num_spilled=np.array(spilled),
        separators=np.concatenate(listed),
        separators_start=np.cumsum([0, *map(len, listed)]),
    )
    return ops.PrefillMetadata.on(DEVICE, plan_tiles(requests, policy, tile_tokens))


def random_prompt(rng: np.random.Generator, length: int, start: int, density: float):
    """(is_separator, chunk_start) with separators at random."""
    return (rng.random(length) < density).tolist(), start


def prompt(length: int, start: int, density: float = 0.3) -> tuple[list[bool], int]:
    """The same separators for the same sizes."""
    return random_prompt(np.random.default_rng(length * 1000 + start), length, start, density)
