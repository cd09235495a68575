"""One attention layer's step, on every platform: its metadata, and what is done with it.

Prefill is ours, the rest vLLM's own.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionImplBase,
    AttentionLayer,
    AttentionMetadata,
)

from vllm_sepllm.ops.rotation import KeyRotation

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


class SepLLMImpl(AttentionImpl[SepLLMMetadata[Prefill]], Generic[Prefill]):
    """Wraps the implementation that vLLM chose for the layer."""

    def __init__(self, wrapped: Any) -> None:
        """``wrapped`` is the layer's AttentionImpl, of vLLM's CPU backend or WRAPPED_BACKENDS."""
        self.wrapped = wrapped
        self.num_heads = wrapped.num_heads
        self.num_kv_heads = wrapped.num_kv_heads
        self.head_size = wrapped.head_size
        self.scale = wrapped.scale
        self.kv_cache_dtype = wrapped.kv_cache_dtype
        self.alibi_slopes = wrapped.alibi_slopes
        # set by workers that renumber positions
        self.rotation: KeyRotation | None = None

    def get_impl_variants(self) -> tuple[AttentionImplBase[Any], ...]:
        """The wrapped implementation: builders look for their own kind to learn what layers do."""
        variants: tuple[AttentionImplBase[Any], ...] = self.wrapped.get_impl_variants()
        return variants

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Weights were loaded anew: the wrapped implementation may keep some of them."""
        self.wrapped.process_weights_after_loading(act_dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SepLLMMetadata[Prefill] | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See vLLM's AttentionImpl.forward; writes ``output`` and the cache."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "sepllm does not support fused output quantization: set "
                'compilation_config={"pass_config": {"fuse_attn_quant": false}}'
            )
        if attn_metadata is None:  # the model runs without requests
            return output.fill_(0)
        step = attn_metadata
        # each part may overwrite what the parts before it have read
        if step.prefill is not None:
            self.prefill(layer, query, key, value, kv_cache, step.prefill, output)
        if step.moves is not None:
            self.move(kv_cache, step.moves)
        if step.checkpoint is not None:
            tokens, slots = step.checkpoint.tokens, step.checkpoint.slots
            self.wrapped.do_kv_cache_update(layer, key[tokens], value[tokens], kv_cache, slots)
        # a batch may be padded for the other ranks of a data-parallel engine
        real = slice(len(step.slots))
        self.wrapped.do_kv_cache_update(layer, key[real], value[real], kv_cache, step.slots)
        if step.library is not None:
            first = slice(step.library.num_tokens)
            self.wrapped.forward(
                layer, self.library_query(layer, query[first]), key[first], value[first],
                kv_cache, step.library.metadata, output[first],
            )  # fmt: skip
        return output

    def library_query(self, layer: AttentionLayer, query: torch.Tensor) -> torch.Tensor:
        """``query`` as the wrapped implementation takes it."""
        return query

    @abstractmethod
    def prefill(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: Prefill,
        output: torch.Tensor,
    ) -> None:
        """Attention of the step's chunks; reads the cache as it was before the step."""

    @abstractmethod
    def move(self, kv_cache: torch.Tensor, moves: SlotMoves) -> None:
        """Copy entries inside the layer's cache."""
