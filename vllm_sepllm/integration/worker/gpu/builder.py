"""Slots, copies and prefill tiles of a step on a GPU, in buffers that CUDA graphs may capture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import vllm.utils.torch_utils as vllm_torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_sepllm import ops
from vllm_sepllm.integration.worker.builder import BuilderMixin
from vllm_sepllm.integration.worker.impl import LibraryRows, SepLLMMetadata, SlotMoves
from vllm_sepllm.policy.keys.tiles import PrefillRequests, plan_tiles
from vllm_sepllm.policy.step.batch import BatchStep, Rotations
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray

# attributes of vLLM's builders (v1/attention/backends) as they are where no graph is captured:
# FlashInferMetadataBuilder's, FlashAttentionMetadataBuilder's
_NO_GRAPHS = {"enable_cuda_graph": False, "max_num_splits": 0}


class GPUBuilderMixin(BuilderMixin):
    """Mixin before the builder of the backend that vLLM chose.

    What a CUDA graph captures stays at one address: the slots and the compact lengths. Everything
    else is used outside graphs, in copies before the forward and in prefill, which runs eagerly
    between the pieces of a piecewise graph.
    """

    # a group's copies are its own: no metadata of one serves another
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scheduler = self.vllm_config.scheduler_config
        # a graph may be wider than any batch
        graph = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        num_tokens = max(scheduler.max_num_batched_tokens, graph)
        self._slots = torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device)
        num_rows = max(scheduler.max_num_seqs, graph)
        self._lengths = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        self._is_capturing = False

    def take_layers(self, layers: Sequence[Any]) -> None:
        """See the base class; the layers learn where their caches are."""
        self._caches = ops.CacheTable.build([layer.kv_cache for layer in layers])
        self._turns = _turns(layers)
        for layer in layers:
            layer.impl.bind(layer.kv_cache)
        first = layers[0]
        self._tile_tokens = ops.prefill_tile_tokens(
            first.num_heads, first.num_kv_heads, first.head_size, first.dtype
        )

    def release(self) -> None:
        """Let go of the caches, and have the layers do so: a model may outlive its worker."""
        for layer in self._layers:
            layer.impl.release()
        del self._caches, self._turns, self._layers

    def warm_up(self, max_blocks: int) -> None:
        """Compile our kernels, on one made-up token and without writing anything.

        Args:
            max_blocks: width of the block table, by which Triton tells variants apart.
        """
        table = torch.zeros(1, max_blocks, dtype=torch.int32, device=self.device)
        policy = BatchPolicy.of([self._spec.policy], self._spec.policy)
        rows = self._prefill_rows(PrefillRequests.lone_token(), policy, table)
        slot = self._slots[:1].fill_(-1)
        ops.entry_slots(self.upload(np.full((2, 1), -1)), table, self._block_size, slot)
        ops.spill(self._caches, torch.zeros_like(slot), slot)
        self._turn(slot, torch.zeros_like(slot))
        # layers may differ in soft cap and sinks
        for layer in self._layers:
            size = (1, layer.num_heads, layer.head_size)
            query = torch.zeros(size, dtype=layer.dtype, device=self.device)
            key = query[:, : layer.num_kv_heads].contiguous()
            layer.impl.prefill(layer, query, key, key, layer.kv_cache, rows, query)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """FULL graphs for decode alone, prefill in pieces: its tiles differ step by step.

        Not for batches of drafts either (the worker's ``_check_graphs``).
        """
        wrapped = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        ours = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return min(wrapped, ours, key=lambda support: support.value)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SepLLMMetadata[ops.PrefillMetadata]:
        """The metadata whose buffers a graph captures; each later step fills them."""
        common = self._in_buffers(common_attn_metadata)
        self._is_capturing = True  # the wrapped builder calls build, and means its own
        try:
            metadata = super().build_for_cudagraph_capture(common)
        finally:
            self._is_capturing = False
        rows = LibraryRows(common.num_actual_tokens, metadata)
        return SepLLMMetadata(common.slot_mapping, rows)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """See the base class."""
        if self._is_capturing:
            return self.build_wrapped(common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def without_requests(
        self, common: CommonAttentionMetadata
    ) -> SepLLMMetadata[ops.PrefillMetadata]:
        """See the base class."""
        common = self._in_buffers(common)
        rows = LibraryRows(common.num_actual_tokens, self.build_wrapped(common))
        return SepLLMMetadata(common.slot_mapping, rows)

    def _in_buffers(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A run without requests: nothing is written, lengths are vLLM's."""
        slots = self._slots[: common.num_actual_tokens].fill_(-1)
        lengths = self._lengths[: common.num_reqs].copy_(common.seq_lens[: common.num_reqs])
        return common.replace(seq_lens=lengths, slot_mapping=slots)

    def upload(self, array: NDArray[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """See the base class; through pinned memory and without waiting."""
        # by attribute: vLLM's CPU platform replaces the function
        return vllm_torch.async_tensor_h2d(array, device=self.device, dtype=dtype)

    def upload_lengths(self, lengths: NDArray[np.int32]) -> torch.Tensor:
        """See the base class; to the buffer."""
        held = self._lengths[: len(lengths)]
        vllm_torch.async_tensor_h2d(lengths, out=held)
        return held

    def entry_slots(
        self, rows: IntArray, entries: IntArray, common: CommonAttentionMetadata
    ) -> torch.Tensor:
        """See the base class."""
        out = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        return self._fill_slots(rows, entries, common, out)

    def token_slots(self, step: BatchStep, common: CommonAttentionMetadata) -> torch.Tensor:
        """See the base class; in the buffer."""
        return self._fill_slots(step.rows, step.target, common, self._slots[: len(step.rows)])

    def _fill_slots(
        self, rows: IntArray, entries: IntArray, common: CommonAttentionMetadata, out: torch.Tensor
    ) -> torch.Tensor:
        uploaded = self.upload(np.stack([rows, entries]))
        ops.entry_slots(uploaded, common.block_table_tensor, self._block_size, out)
        return out

    def slot_moves(self, slots: torch.Tensor) -> SlotMoves:
        """See the base class; slots."""
        return SlotMoves(*slots.chunk(2))

    def copy(self, moves: SlotMoves | None) -> None:
        """See the base class; one launch."""
        if moves is not None:
            ops.spill(self._caches, moves.source, moves.target)

    def turn(self, rotations: Rotations, common: CommonAttentionMetadata) -> None:
        """See the base class; a launch for all layers that turn alike, which mostly are all."""
        slots = self.entry_slots(rotations.rows, rotations.entries, common)
        self._turn(slots, self.upload(rotations.delta))

    def _turn(self, slots: torch.Tensor, delta: torch.Tensor) -> None:
        for keys, rotation in self._turns:
            ops.turn(keys, rotation, slots, delta)

    def library(
        self, step: BatchStep, common: CommonAttentionMetadata, slots: torch.Tensor
    ) -> LibraryRows | None:
        """See the base class."""
        # without what builders of other groups have derived from the lengths so far
        common = common.unpadded(common.num_actual_tokens, common.num_reqs)
        with self._outside_graphs() if step.chunks else nullcontext():
            return super().library(step, common, slots)

    @contextmanager
    def _outside_graphs(self) -> Iterator[None]:
        """Decodes cut off a mixed batch look like a graph's to the wrapped builder.

        FlashInferMetadataBuilder would make a wrapper, with buffers of its own, for each number of
        them and keep it; FlashAttentionMetadataBuilder would have its kernel allocate a graph's
        number of splits, hundreds of MB. Told that there are no graphs, both do what they do for
        batches without one. To be dropped when vLLM tells ``build`` whether a graph is replayed.
        """
        told = {name: value for name, value in _NO_GRAPHS.items() if hasattr(self, name)}
        saved = {name: getattr(self, name) for name in told}
        vars(self).update(told)
        try:
            yield
        finally:
            vars(self).update(saved)

    def prefill(self, step: BatchStep, common: CommonAttentionMetadata) -> ops.PrefillMetadata:
        """See the base class."""
        policy = BatchPolicy.of([chunk.policy for chunk in step.chunks], self._spec.policy)
        return self._prefill_rows(step.prefill_requests(), policy, common.block_table_tensor)

    def _prefill_rows(
        self, requests: PrefillRequests, policy: BatchPolicy, block_table: torch.Tensor
    ) -> ops.PrefillMetadata:
        tables = plan_tiles(requests, policy, self._tile_tokens)
        packed = self.upload(tables.packed, torch.int32)
        metadata = ops.PrefillMetadata.from_packed(tables, packed)
        return ops.list_keys(metadata, block_table, self._block_size)


def _turns(layers: Sequence[Any]) -> list[tuple[ops.CacheTable, ops.KeyRotation]]:
    """Keys that turn together, and how; empty where positions are those of the text."""
    alike: dict[int, list[Any]] = {}
    for layer in layers:
        if layer.impl.rotation is not None:
            alike.setdefault(id(layer.impl.rotation), []).append(layer)
    return [
        # K is the first half of an entry
        (
            ops.CacheTable.build([one.kv_cache[..., : one.head_size] for one in found]),
            found[0].impl.rotation,
        )
        for found in alike.values()
    ]
