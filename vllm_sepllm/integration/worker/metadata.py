"""Attention metadata of a step, for the layers of a KV cache group on every platform."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from vllm.v1.attention.backend import AttentionMetadata

# what the platform's prefill attention reads
Prefill = TypeVar("Prefill")


@dataclass(frozen=True, slots=True)
class SlotMoves:
    """Copies of whole entries, of all heads, as the platform's copy takes them.

    Attributes:
        source: int64; [num_moves] slots, or the elements of those slots in a flat cache.
        target: like ``source``, none of them a source.
    """

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class LibraryRows:
    """The batch's first requests, served by vLLM's own backend from the cache alone.

    Attributes:
        num_tokens: their tokens, padding of a CUDA graph included.
        metadata: of that backend, with compact lengths for sequence lengths.
    """

    num_tokens: int
    metadata: Any


@dataclass(frozen=True, slots=True)
class CheckpointTokens:
    """Tokens of the step whose KV goes to a checkpoint as well.

    Attributes:
        tokens: [num_writes] int64 rows of the batch.
        slots: [num_writes] int64.
    """

    tokens: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class SepLLMMetadata(AttentionMetadata, Generic[Prefill]):
    """One step, for all layers of a group. What a batch does not need is None.

    Attributes:
        slots: [num_tokens] int64, where each token's KV goes, -1: nowhere.
        library: the first requests.
        prefill: the others, chunks that attend to cache, ring and their own keys.
        moves: separators that leave a ring, copied after the chunks' attention.
        checkpoint: KV that a checkpoint keeps besides.
    """

    slots: torch.Tensor
    library: LibraryRows | None
    prefill: Prefill | None = None
    moves: SlotMoves | None = None
    checkpoint: CheckpointTokens | None = None
