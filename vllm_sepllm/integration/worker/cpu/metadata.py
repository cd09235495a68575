"""What one step looks like to the CPU layers of a KV cache group."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from vllm_sepllm.integration.worker.cpu.kv_layout import CPUCacheLayout
from vllm_sepllm.integration.worker.cpu.sequences import ChunkSequences
from vllm_sepllm.policy.step.prefill import QueryTile


@dataclass(frozen=True, slots=True)
class SlotCopies:
    """Flat element indices of whole slots, source and target (CPUCacheLayout.slot_elements)."""

    source: torch.Tensor
    target: torch.Tensor

    def run(self, kv_cache: torch.Tensor) -> None:
        """Copy inside a contiguous cache. All sources are read before a target is written."""
        flat = kv_cache.view(-1)
        flat.index_copy_(0, self.target, flat.index_select(0, self.source))


@dataclass(frozen=True, slots=True)
class LibraryRows:
    """Requests that vLLM's own kernel serves from the cache alone.

    Attributes:
        spills: copies ring -> tail, before anything is written; None: no separator leaves.
        tokens: [num_tokens] int64 rows of the batch; None: they are its first rows.
        num_tokens: how many.
        slots: [num_tokens] int64, where each new token's KV goes.
        metadata: vLLM's, with compact lengths for sequence lengths.
    """

    spills: SlotCopies | None
    tokens: torch.Tensor | None
    num_tokens: int
    slots: torch.Tensor
    metadata: CPUAttentionMetadata


@dataclass(frozen=True, slots=True)
class TileTensors:
    """A query tile (policy/step/prefill.py) as tensors.

    Attributes:
        first: first query, counted from the start of the chunk.
        last: end of the queries, exclusive.
        keys: [num_keys] int64, key numbers; those that every query reads come first.
        bias: [last - first, num_partial], 0 or -inf in the dtype of the queries, for the last keys.
    """

    first: int
    last: int
    keys: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, tile: QueryTile, dtype: torch.dtype) -> "TileTensors":
        """Of a planned tile, for queries of ``dtype``."""
        bias = torch.zeros(tile.hidden.shape, dtype=dtype)
        bias.masked_fill_(torch.from_numpy(tile.hidden), float("-inf"))
        return cls(tile.first, tile.last, torch.from_numpy(tile.keys), bias)

    def mask(self, zeros: torch.Tensor) -> torch.Tensor | None:
        """[last - first, num_keys] to add to scores, a view of ``zeros``; None: nothing is hidden.

        Holds until the next call for the same ``zeros``, which is [most queries of a tile, most
        keys]. Only the last columns are written: a mask for each tile would take as much memory as
        the whole chunk's scores of a head.
        """
        num_queries, num_partial = self.bias.shape
        if num_partial == 0:
            return None
        mask = zeros[:num_queries, zeros.shape[1] - len(self.keys) :]
        mask[:, -num_partial:] = self.bias
        return mask

    def clear(self, zeros: torch.Tensor) -> None:
        """Undo :meth:`mask`."""
        num_queries, num_partial = self.bias.shape
        zeros[:num_queries, zeros.shape[1] - num_partial :] = 0


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A prefill chunk of one request.

    Attributes:
        first: its first row in the batch.
        last: end of its rows, exclusive.
        block_ids: [num_blocks] int64 that hold its cache as the step begins.
        num_cached: entries in them.
        sequences: for vLLM's kernel; None: it cannot.
        tiles: then queries and the keys they read.
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
        chunks: they attend first, each on its own.
        zeros: [most queries of a tile, most keys of one], where tiles put their masks.
        copies: then separators that leave the ring go to the tail; None: there are none.
        tokens: [num_kept] int64 rows of the batch whose KV is kept, written last.
        slots: [num_kept] int64, where.
    """

    layout: CPUCacheLayout
    chunks: list[ChunkRows]
    zeros: torch.Tensor
    copies: SlotCopies | None
    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class CheckpointWrites:
    """Checkpoints that the step leaves, filled before the requests' own entries change.

    Attributes:
        copies: entries that the caches hold as the step begins; None: there are none.
        tokens: [num_writes] int64 rows of the batch.
        slots: [num_writes] int64, where their KV goes as well.
    """

    copies: SlotCopies | None
    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class SepLLMCPUMetadata(AttentionMetadata):
    """The rows of a batch, split by who attends, and checkpoints. Each part may be absent."""

    checkpoints: CheckpointWrites | None
    library: LibraryRows | None
    prefill: PrefillRows | None
