"""What one step looks like to the GPU layers of a KV cache group."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadata

from vllm_sepllm.ops import PrefillMetadata


@dataclass(frozen=True, slots=True)
class SlotMoves:
    """Copies of whole entries, of all heads.

    Attributes:
        source: [num_moves] int64 slots.
        target: [num_moves] int64 slots, none of them a source.
    """

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class LibraryRows:
    """The batch's first requests, served by the wrapped backend from the cache alone.

    Attributes:
        num_tokens: their tokens, padding of a CUDA graph included.
        metadata: of the wrapped backend, with compact lengths for sequence lengths.
    """

    num_tokens: int
    metadata: Any


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """The other requests: chunks that attend to cache, ring and their own keys.

    Attributes:
        metadata: tiles of the step.
        block_table: [num_requests, max_blocks] int32, of the whole batch.
        moves: separators that leave the ring, copied after attention; None: there are none.
    """

    metadata: PrefillMetadata
    block_table: torch.Tensor
    moves: SlotMoves | None


@dataclass(frozen=True, slots=True)
class CheckpointTokens:
    """Tokens of the step that go to a checkpoint as well.

    Attributes:
        tokens: [num_writes] int64 rows of the batch.
        slots: [num_writes] int64.
    """

    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class SepLLMGPUMetadata(AttentionMetadata):
    """One step, for all layers of a group. Each part may be absent.

    Attributes:
        slots: [num_tokens] int64, where each token's KV goes, -1: nowhere; in a persistent buffer.
        library: rows of the wrapped backend.
        prefill: rows of our kernel.
        checkpoint: KV that a checkpoint keeps besides.
    """

    slots: torch.Tensor
    library: LibraryRows | None
    prefill: PrefillRows | None
    checkpoint: CheckpointTokens | None
