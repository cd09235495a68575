"""Turns the step's plan into slots, compact lengths and prefill tiles on the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import vllm.utils.torch_utils as vllm_torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_sepllm import ops
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu.metadata import (
    CheckpointTokens,
    LibraryRows,
    PrefillRows,
    SepLLMGPUMetadata,
    SlotMoves,
)
from vllm_sepllm.policy.keys.tiles import PrefillRequests, plan_tiles
from vllm_sepllm.policy.step import batch
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray

RequestIds = Callable[[CommonAttentionMetadata], Sequence[str]]


class GPUBuilderMixin(AttentionMetadataBuilder[Any]):
    """Goes before the wrapped backend's builder, which serves the rows of the library.

    What a CUDA graph captures stays at one address: the slots and the compact lengths. Everything
    else is used outside graphs, in spills before the forward and in prefill, which runs eagerly
    between the pieces of a piecewise graph.
    """

    # a group's spills are its own: no metadata of one serves another
    supports_update_block_table = False
    enable_cuda_graph: bool  # FlashInferMetadataBuilder's; other builders have none

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # single-token rows first (Model Runner V1; V2 always sorts so)
        self.reorder_batch_threshold = 1
        spec = self.kv_cache_spec
        assert isinstance(spec, SepLLMSpec), f"not a SepLLM layer: {spec}"
        self._policy = spec.policy
        self._block_size = spec.block_size
        scheduler = self.vllm_config.scheduler_config
        # a graph may be wider than any batch
        graph = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        num_tokens = max(scheduler.max_num_batched_tokens, graph)
        self._slots = torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device)
        num_rows = max(scheduler.max_num_seqs, graph)
        self._lengths = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        self._step: CurrentStep | None = None
        self._is_capturing = False

    def bind(
        self,
        step: CurrentStep,
        request_ids: RequestIds,
        group_id: int,
        manager_block_size: int,
        layers: Sequence[Any],
    ) -> None:
        """Say where the plan of each step is, and which caches its spills move entries in.

        Args:
            step: of the worker.
            request_ids: gives the requests of a batch, row by row.
            group_id: the KV cache group that this builds for.
            manager_block_size: tokens of the blocks that the scheduler counts, which this
                builder's may be cut from.
            layers: vLLM's Attention layers of the group, with their caches.
        """
        self._step = step
        self._group_id = group_id
        self._manager_block_size = manager_block_size
        self._request_ids = request_ids
        self._layers = layers
        self._spills = ops.SpillTable.build([layer.kv_cache for layer in layers])
        first = layers[0]
        self._tile_tokens = ops.prefill_tile_tokens(
            first.num_heads, first.num_kv_heads, first.head_size, first.dtype
        )

    def warm_up(self, max_blocks: int) -> None:
        """Compile our kernels, on one made-up token and without writing anything.

        Args:
            max_blocks: width of the block table, by which Triton tells variants apart.
        """
        one = PrefillRequests.lone_token()
        tables = plan_tiles(one, self._policy, self._tile_tokens)
        packed = self._upload(tables.packed, torch.int32)
        table = torch.zeros(1, max_blocks, dtype=torch.int32, device=self.device)
        metadata = ops.PrefillMetadata.from_packed(tables, packed)
        metadata = ops.list_keys(metadata, table, self._block_size)
        slot = self._slots[:1].fill_(-1)
        ops.entry_slots(self._upload(np.full((2, 1), -1)), table, self._block_size, slot)
        ops.spill(self._spills, torch.zeros_like(slot), slot)
        # they may differ in what they add to attention
        for layer in self._layers:
            size = (1, layer.num_heads, layer.head_size)
            query = torch.zeros(size, dtype=layer.dtype, device=self.device)
            key = query[:, : layer.num_kv_heads].contiguous()
            layer.impl.prefill(
                layer, query, key, key, layer.kv_cache, PrefillRows(metadata, table, None), query
            )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """FULL graphs for decode alone, prefill in pieces: its tiles differ step by step."""
        wrapped = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        ours = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return min(wrapped, ours, key=lambda support: support.value)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SepLLMGPUMetadata:
        """The metadata whose buffers a graph captures; each later step fills them."""
        common = self._in_buffers(common_attn_metadata)
        self._is_capturing = True  # the wrapped builder calls build, and means its own
        try:
            metadata = super().build_for_cudagraph_capture(common)
        finally:
            self._is_capturing = False
        rows = LibraryRows(common.num_actual_tokens, metadata)
        return SepLLMGPUMetadata(common.slot_mapping, rows, None, None)

    def _in_buffers(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """A run without requests: nothing is written, lengths are vLLM's."""
        slots = self._slots[: common.num_actual_tokens].fill_(-1)
        lengths = self._lengths[: common.num_reqs].copy_(common.seq_lens[: common.num_reqs])
        return common.replace(seq_lens=lengths, slot_mapping=slots)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SepLLMGPUMetadata:
        """See vLLM's AttentionMetadataBuilder.build.

        Launches the step's spills, which concern entries that exist before it.
        """
        common = common_attn_metadata
        if self._is_capturing:
            return self._build_wrapped(common)  # type: ignore[no-any-return]
        if self._step is None or self._step.is_dummy:
            common = self._in_buffers(common)
            library = LibraryRows(common.num_actual_tokens, self._build_wrapped(common))
            return SepLLMGPUMetadata(common.slot_mapping, library, None, None)
        rows = self._step.rows(self._request_ids(common), self._group_id)
        first = common.query_start_loc_cpu[: len(rows.start) + 1].numpy().astype(np.int64)
        policy = rows.policy(self._policy)
        step = batch.plan_batch(
            policy, rows, first, common.num_actual_tokens, self._manager_block_size
        )
        slots = self._slots[: common.num_actual_tokens]
        self._entry_slots(step.rows, step.target, common, slots)
        # in this order: each step of it may overwrite what the one before has read
        self._run(self._move_entries(step.commit_spills, common))
        self._run(self._move_entries(step.commits, common))
        self._run(self._save_entries(step.saves_before, common))
        self._run(self._move_entries(step.spills, common))
        if (after := self._save_entries(step.saves_after, common)) is not None:
            self._step.afterwards(partial(self._run, after))
        return SepLLMGPUMetadata(
            slots=slots,
            library=self._library(common, step),
            prefill=self._prefill(common, step, policy),
            checkpoint=self._checkpoint_tokens(step),
        )

    def _build_wrapped(self, common: CommonAttentionMetadata) -> Any:
        return super().build(0, common)  # type: ignore[safe-super]  # the wrapped builder's

    def _upload(self, array: NDArray[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """An array on the device, through pinned memory and without waiting."""
        # by attribute: vLLM's CPU platform replaces the function
        return vllm_torch.async_tensor_h2d(array, device=self.device, dtype=dtype)

    def _entry_slots(
        self, rows: IntArray, compact: IntArray, common: CommonAttentionMetadata, out: torch.Tensor
    ) -> torch.Tensor:
        entries = self._upload(np.stack([rows, compact]))
        ops.entry_slots(entries, common.block_table_tensor, self._block_size, out)
        return out

    def _move_entries(
        self, moves: batch.Moves, common: CommonAttentionMetadata
    ) -> SlotMoves | None:
        if len(moves.rows) == 0:
            return None
        rows = np.concatenate([moves.rows, moves.rows])
        compact = np.concatenate([moves.source, moves.target])
        out = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        source, target = self._entry_slots(rows, compact, common, out).chunk(2)
        return SlotMoves(source, target)

    def _save_entries(
        self, saves: batch.Saves, common: CommonAttentionMetadata
    ) -> SlotMoves | None:
        if len(saves.rows) == 0:
            return None
        out = torch.empty(len(saves.rows), dtype=torch.int64, device=self.device)
        source = self._entry_slots(saves.rows, saves.source, common, out)
        return SlotMoves(source, self._upload(saves.slots))

    def _run(self, moves: SlotMoves | None) -> None:
        """Move entries in the caches of all layers."""
        if moves is not None:
            ops.spill(self._spills, moves.source, moves.target)

    def _library(
        self, common: CommonAttentionMetadata, step: batch.BatchStep
    ) -> LibraryRows | None:
        if step.num_library == 0:
            return None
        # rows and tokens that pad a CUDA graph come last and have length 0
        has_prefill = step.requests is not None
        num_rows = step.num_library if has_prefill else common.num_reqs
        num_tokens = step.num_library_tokens if has_prefill else common.num_actual_tokens
        lengths = np.zeros(num_rows, dtype=np.int32)
        lengths[: step.num_library] = step.lengths
        vllm_torch.async_tensor_h2d(lengths, out=self._lengths[:num_rows])
        part = common.unpadded(num_tokens, num_rows).replace(
            seq_lens=self._lengths[:num_rows],
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            max_seq_len=int(lengths.max()),
            max_query_len=step.max_query_len,
            slot_mapping=self._slots[:num_tokens],
        )
        with self._outside_graphs() if has_prefill else nullcontext():
            return LibraryRows(num_tokens, self._build_wrapped(part))

    @contextmanager
    def _outside_graphs(self) -> Iterator[None]:
        """Decodes cut off a mixed batch look like a graph's to FlashInferMetadataBuilder.

        It would make a wrapper, with buffers of its own, for each number of them and keep it; told
        that there are no graphs (v1/attention/backends/flashinfer.py) it takes its general one.
        To be dropped when vLLM tells ``build`` whether a graph is replayed.
        """
        if not hasattr(self, "enable_cuda_graph"):
            yield
            return
        enabled, self.enable_cuda_graph = self.enable_cuda_graph, False
        try:
            yield
        finally:
            self.enable_cuda_graph = enabled

    def _prefill(
        self, common: CommonAttentionMetadata, step: batch.BatchStep, policy: BatchPolicy
    ) -> PrefillRows | None:
        if step.requests is None:
            return None
        own = policy.of_rows(step.requests.table_row)
        tables = plan_tiles(step.requests, own, self._tile_tokens)
        packed = self._upload(tables.packed, torch.int32)
        metadata = ops.PrefillMetadata.from_packed(tables, packed)
        return PrefillRows(
            ops.list_keys(metadata, common.block_table_tensor, self._block_size),
            common.block_table_tensor,
            self._move_entries(step.moves_after, common),
        )

    def _checkpoint_tokens(self, step: batch.BatchStep) -> CheckpointTokens | None:
        if len(step.saved_tokens) == 0:
            return None
        return CheckpointTokens(self._upload(step.saved_tokens), self._upload(step.saved_slots))
