"""The prefill chunks of a step as the CPU layers of a KV cache group read them."""

from dataclasses import dataclass

import torch

from vllm_sepllm.integration.worker.cpu.kv_layout import CPUCacheLayout
from vllm_sepllm.integration.worker.cpu.masked_tiles import TileTensors
from vllm_sepllm.integration.worker.cpu.sequences import ChunkSequences


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A prefill chunk of one request.

    Attributes:
        first: its first row in the batch.
        last: end of its rows, exclusive.
        block_ids: [num_blocks] int64 that hold its cache as the step begins.
        num_cached: entries in them.
        sequences: what vLLM's kernel attends to; None: it cannot.
        tiles: queries and the keys that they read, where there are no sequences.
    """

    first: int
    last: int
    block_ids: torch.Tensor
    num_cached: int
    sequences: ChunkSequences | None
    tiles: list[TileTensors]


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """All prefill chunks of the step.

    Attributes:
        layout: of the cache that the chunks read.
        chunks: each attends on its own.
        zeros: [most queries of a tile, most keys of one], where tiles put their masks.
    """

    layout: CPUCacheLayout
    chunks: list[ChunkRows]
    zeros: torch.Tensor
