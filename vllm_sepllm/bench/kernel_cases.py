"""Inputs of the kernels at the sizes of real models: one layer, random values and separators."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sepllm import ops
from vllm_sepllm.kernels.tuning import Tuning
from vllm_sepllm.ops import reference
from vllm_sepllm.policy.keys.columns import TILE
from vllm_sepllm.policy.keys.tiles import PrefillRequests, plan_tiles
from vllm_sepllm.policy.visibility import BatchPolicy, Policy

DEVICE = "cuda"
BLOCK_SIZE = 16
DENSITY = 0.13  # of the rule "extended" among the tokens of English text
POLICY = Policy(initial_tokens=4, window=252)


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of a model.

    Attributes:
        model: whose they are.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        size: elements a head.
    """

    model: str
    num_heads: int
    num_kv_heads: int
    size: int

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.num_kv_heads


HEADS = (
    Heads("Llama-3.2-1B", 32, 8, 64),
    Heads("Llama-3-8B", 32, 8, 128),
    Heads("Gemma-2-9B", 16, 8, 256),
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One prefill step of one request: positions [start, end) of a prompt.

    Attributes:
        heads: of the layer.
        query: [end - start, num_heads, size].
        key: [end - start, num_kv_heads, size].
        value: like ``key``.
        cache: what the request kept of the positions before ``start``.
        block_table: [1, max_blocks] int32.
        metadata: tables of the step.
    """

    heads: Heads
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: ops.PagedCache
    block_table: torch.Tensor
    metadata: ops.PrefillMetadata

    def run(self, out: torch.Tensor, tuning: Tuning | None = None) -> None:
        """``out`` is like ``query``; ``tuning``: the launch, None for the table's."""
        kv = self.key, self.value, self.cache
        ops.prefill(self.query, *kv, self.metadata, self._logits, out, tuning=tuning)

    def run_reference(self, out: torch.Tensor) -> None:
        """The same by the oracle; ``out`` of any float dtype."""
        kv = self.key, self.value, self.cache, self.block_table
        reference.prefill(self.query, *kv, self.metadata, self._logits, out)

    @property
    def _logits(self) -> ops.Logits:
        return ops.Logits(self.heads.size**-0.5)

    @property
    def flops(self) -> float:
        """Products of the keys that each tile touches; those masked inside it are computed, too."""
        tiles = self.metadata.tiles.cpu().numpy().view(TILE)
        runs = [tiles[source] for source in ("cached", "chunk")]
        keys = sum(run["num_initial"] + run["num_far"] + run["num_near"] for run in runs)
        pairs = int((keys * tiles["num_tokens"].astype(np.int64)).sum())
        return 4.0 * pairs * self.heads.num_heads * self.heads.size


def paged(
    heads: Heads, num_rows: int, num_tokens: int, dtype: torch.dtype
) -> tuple[ops.PagedCache, torch.Tensor]:
    """A random cache of ``num_rows`` requests in scattered blocks, laid out as FlashAttention's.

    Returns:
        The cache and its block table, [num_rows, max_blocks] int32.
    """
    max_blocks = -(-num_tokens // BLOCK_SIZE)
    shape = (2, num_rows * max_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.size)
    key, value = randn(shape, dtype).transpose(2, 3)
    table = torch.randperm(num_rows * max_blocks, device=DEVICE).view(num_rows, max_blocks)
    return ops.PagedCache(key, value), table.to(torch.int32)


def chunk(
    heads: Heads,
    start: int,
    end: int,
    *,
    policy: Policy = POLICY,
    dtype: torch.dtype = torch.bfloat16,
    tile_tokens: int | None = None,
) -> Chunk:
    """Positions [start, end) of a prompt with :data:`DENSITY` separators; the same every time."""
    flags = np.random.default_rng(0).random(end) < DENSITY
    flags[: policy.initial_tokens] = False
    lowest = max(policy.initial_tokens, start - policy.window)
    num_spilled = int(flags[:lowest].sum())
    zero = np.zeros(1, dtype=np.int64)
    separators = np.flatnonzero(flags[lowest:]) + lowest
    requests = PrefillRequests(
        table_row=zero,
        query_start=zero,
        chunk_start=zero + start,
        chunk_end=zero + end,
        num_spilled=zero + num_spilled,
        separators=separators,
        separators_start=np.array([0, len(separators)]),
    )
    tile_tokens = tile_tokens or ops.prefill_tile_tokens(
        heads.num_heads, heads.num_kv_heads, heads.size, dtype
    )
    own = BatchPolicy.of([policy], policy)
    tables = plan_tiles(requests, own, tile_tokens)
    sizes: list[Any] = [(end - start, n, heads.size) for n in (heads.num_heads, heads.num_kv_heads)]
    cache, block_table = paged(heads, 1, policy.num_dense + num_spilled + 1, dtype)
    metadata = ops.PrefillMetadata.on(DEVICE, tables)
    return Chunk(
        heads,
        randn(sizes[0], dtype),
        randn(sizes[1], dtype),
        randn(sizes[1], dtype),
        cache,
        block_table,
        ops.list_keys(metadata, block_table, BLOCK_SIZE),
    )


def randn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal values on the device."""
    return torch.randn(shape, dtype=dtype, device=DEVICE)
