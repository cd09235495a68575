"""What one step looks like to the CPU layers of a KV cache group."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from vllm_sepllm.integration.cpu.kv_layout import CPUCacheLayout


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
    """A query tile (policy/prefill.py) as tensors.

    Attributes:
        first: first query, counted from the start of the chunk.
        last: end of the queries, exclusive.
        keys: [num_keys] int64, key numbers.
        bias: [last - first, num_keys], 0 or -inf in the dtype of the queries; None: reads all.
    """

    first: int
    last: int
    keys: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A prefill chunk of one request.

    Attributes:
        first: its first row in the batch.
        last: end of its rows, exclusive.
        block_ids: [num_blocks] int64 that hold its cache as the step begins.
        num_cached: entries in them.
        tiles: queries and the keys they read.
    """

    first: int
    last: int
    block_ids: torch.Tensor
    num_cached: int
    tiles: list[TileTensors]


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """All prefill chunks of the step.

    Attributes:
        layout: of the cache that the chunks read.
        chunks: they attend first, each on its own.
        copies: then separators that leave the ring go to the tail; None: there are none.
        tokens: [num_kept] int64 rows of the batch whose KV is kept, written last.
        slots: [num_kept] int64, where.
    """

    layout: CPUCacheLayout
    chunks: list[ChunkRows]
    copies: SlotCopies | None
    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class SnapshotWrites:
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

    snapshots: SnapshotWrites | None
    library: LibraryRows | None
    prefill: PrefillRows | None
