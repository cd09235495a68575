"""Builder of each step's attention metadata from its plan, for every platform.

Arrays come from :func:`vllm_sepllm.policy.step.batch.plan_batch` and nowhere else; a platform says
where entries lie, how they are copied and what its prefill attention reads.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.impl import (
    CheckpointTokens,
    LibraryRows,
    SepLLMMetadata,
    SlotMoves,
)
from vllm_sepllm.policy.step.batch import BatchStep, Moves, Rotations, Saves, plan_batch
from vllm_sepllm.policy.visibility import IntArray

# tokens of the rows that Model Runner V1 sorts first; V2 always sorts so (policy/step/batch.py)
_REORDER_BATCH_THRESHOLD = 1

# the requests of a batch, row by row
RequestIds = Callable[[CommonAttentionMetadata], Sequence[str]]


class BuilderMixin(AttentionMetadataBuilder[Any]):
    """Mixin before vLLM's own builder of the platform, which serves the rows of the library."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reorder_batch_threshold = _REORDER_BATCH_THRESHOLD
        spec = self.kv_cache_spec
        assert isinstance(spec, SepLLMSpec), f"not a SepLLM layer: {spec}"
        self._spec = spec
        self._block_size = spec.block_size
        self._step: CurrentStep | None = None

    def bind(
        self,
        step: CurrentStep,
        request_ids: RequestIds,
        group_id: int,
        manager_block_size: int,
        layers: Sequence[Any],
    ) -> None:
        """Say where the plan of each step is, and in which caches entries are copied.

        Args:
            step: of the worker.
            request_ids: gives the requests of a batch.
            group_id: the KV cache group that this builds for.
            manager_block_size: tokens of the blocks that the scheduler counts, which this
                builder's may be cut from.
            layers: vLLM's Attention layers of the group, with their caches.
        """
        self._step = step
        self._request_ids = request_ids
        self._group_id = group_id
        self._manager_block_size = manager_block_size
        self._layers = layers
        self.take_layers(layers)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """See vLLM's AttentionMetadataBuilder.build.

        Makes the copies that come before the forward: they concern entries that exist already.
        """
        common = common_attn_metadata
        if self._step is None or self._step.is_dummy:
            return self.without_requests(common)
        rows = self._step.rows(self._request_ids(common), self._group_id)
        first = common.query_start_loc_cpu.numpy()[: len(rows.start) + 1].astype(np.int64)
        step = plan_batch(rows, first, common.num_actual_tokens, self._manager_block_size)
        # in this order: each of them may overwrite what the ones before have read
        if len(step.rotations.rows):
            self.turn(step.rotations, common)
        self.copy(self._moves(step.commit_spills, common))
        self.copy(self._moves(step.commits, common))
        self.copy(self._saves(step.saves_before, common))
        self.copy(self._moves(step.spills, common))
        if (after := self._saves(step.saves_after, common)) is not None:
            self._step.afterwards(partial(self.copy, after))
        slots = self.token_slots(step, common)
        return SepLLMMetadata(
            slots=slots,
            library=self.library(step, common, slots),
            prefill=self.prefill(step, common) if step.chunks else None,
            moves=self._moves(step.moves_after, common),
            checkpoint=self._checkpoint_tokens(step),
        )

    def _moves(self, moves: Moves, common: CommonAttentionMetadata) -> SlotMoves | None:
        if len(moves.rows) == 0:
            return None
        rows = np.concatenate([moves.rows, moves.rows])
        entries = np.concatenate([moves.source, moves.target])
        return self.slot_moves(self.entry_slots(rows, entries, common))

    def _saves(self, saves: Saves, common: CommonAttentionMetadata) -> SlotMoves | None:
        if len(saves.rows) == 0:
            return None
        source = self.entry_slots(saves.rows, saves.source, common)
        return self.slot_moves(torch.cat([source, self.upload(saves.slots)]))

    def _checkpoint_tokens(self, step: BatchStep) -> CheckpointTokens | None:
        saves = step.token_saves
        if len(saves.tokens) == 0:
            return None
        return CheckpointTokens(self.upload(saves.tokens), self.upload(saves.slots))

    def library(
        self, step: BatchStep, common: CommonAttentionMetadata, slots: torch.Tensor
    ) -> LibraryRows | None:
        """The rows that the wrapped backend serves; None if there are none."""
        if step.num_library == 0:
            return None
        # rows and tokens that pad a CUDA graph come last and have length 0
        num_rows, num_tokens = common.num_reqs, common.num_actual_tokens
        if step.chunks:
            num_rows, num_tokens = step.num_library, step.num_library_tokens
            common, slots = common.unpadded(num_tokens, num_rows), slots[:num_tokens]
        lengths = np.zeros(num_rows, dtype=np.int32)
        lengths[: step.num_library] = step.lengths
        common = common.replace(
            seq_lens=self.upload_lengths(lengths),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            max_seq_len=int(lengths.max()),
            max_query_len=step.max_query_len,
            slot_mapping=slots,
        )
        return LibraryRows(num_tokens, self.build_wrapped(common))

    def build_wrapped(self, common: CommonAttentionMetadata) -> Any:
        """The wrapped builder's metadata."""
        return super().build(0, common)  # type: ignore[safe-super]  # the wrapped builder's

    @abstractmethod
    def take_layers(self, layers: Sequence[Any]) -> None:
        """Prepare for the layers of the group and their caches."""

    @abstractmethod
    def without_requests(self, common: CommonAttentionMetadata) -> Any:
        """Metadata of a run that profiles, warms up or captures a graph; None: layers skip it."""

    @abstractmethod
    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """An array of int64 on the device."""

    @abstractmethod
    def upload_lengths(self, lengths: NDArray[np.int32]) -> torch.Tensor:
        """Compact lengths on the device, where the wrapped backend expects sequence lengths."""

    @abstractmethod
    def entry_slots(
        self, rows: IntArray, entries: IntArray, common: CommonAttentionMetadata
    ) -> torch.Tensor:
        """[num_entries] int64 slots of compact entries of the batch's rows, elementwise."""

    @abstractmethod
    def token_slots(self, step: BatchStep, common: CommonAttentionMetadata) -> torch.Tensor:
        """[num_tokens] int64 slots that the step's tokens fill, -1: none."""

    @abstractmethod
    def slot_moves(self, slots: torch.Tensor) -> SlotMoves:
        """Copies from the first half of ``slots`` to the second, as layers take them."""

    @abstractmethod
    def copy(self, moves: SlotMoves | None) -> None:
        """Copy entries in the caches of all layers; None: there is nothing to copy."""

    @abstractmethod
    def turn(self, rotations: Rotations, common: CommonAttentionMetadata) -> None:
        """Give kept keys their new positions in the caches of all layers."""

    @abstractmethod
    def prefill(self, step: BatchStep, common: CommonAttentionMetadata) -> Any:
        """What the platform's prefill attention reads of the step's chunks."""


def bind_builders(
    vllm_config: VllmConfig, runner: Any, step: CurrentStep, request_ids: RequestIds
) -> list[BuilderMixin]:
    """Bind the builders of a model runner's SepLLM layers, and return them.

    Raises:
        ValueError: if kernel blocks of a layer do not lie one behind the other.
    """
    # Model Runner V1 sorts a batch if one of its builders asks for it; a pipeline stage without a
    # SepLLM layer has to sort alike, or the rows of two stages do not match
    runner.reorder_batch_threshold = _REORDER_BATCH_THRESHOLD
    layers = vllm_config.compilation_config.static_forward_context
    bound: list[BuilderMixin] = []
    for group_id, groups in enumerate(runner.attn_groups):
        for group in groups:
            ours = [b for b in group.metadata_builders if isinstance(b, BuilderMixin)]
            if not ours:
                continue
            if group.kernel_block_stride != 0:
                raise ValueError(
                    f"sepllm found other layers' pages between the {group.kernel_block_size}-token "
                    f"blocks of {group.backend.get_name()}, which its slots do not skip; set "
                    f"--block-size {group.kernel_block_size}, or unset VLLM_KV_CACHE_LAYOUT"
                )
            own = [layers[name] for name in group.layer_names]
            for builder in ours:
                builder.bind(step, request_ids, group_id, group.kv_cache_spec.block_size, own)
            bound += ours
    return bound
