"""What a step needs to know of each scheduled request. Made by the scheduler, read by workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separator_index import SeparatorIndex
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy


@dataclass(frozen=True, slots=True)
class PlannedSnapshot:
    """A checkpoint that a step leaves (policy/checkpoint.py).

    Attributes:
        position: tokens of the request that it stands for; the step passes or reaches it.
        blocks: compact block index -> block id, those that the checkpoint has to itself.
    """

    position: int
    blocks: dict[int, int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One row per scheduled request, in any order.

    Attributes:
        rows: request id -> row.
        start: [num_rows], tokens computed before the step: i0.
        num_spilled: [num_rows], separators that left the window before the step.
        spills: [num_rows], for a row of one token: whether the token it overwrites is a separator.
        separators: row -> positions of the separators in [max(a, i0-n), i1), for rows of several
            tokens and rows with snapshots.
        snapshots: row -> checkpoints that the step leaves; rows without any are absent.
    """

    rows: dict[str, int]
    start: IntArray
    num_spilled: IntArray
    spills: BoolArray
    separators: dict[int, IntArray]
    snapshots: dict[int, tuple[PlannedSnapshot, ...]]


@dataclass(slots=True)
class StepPlanBuilder:
    """Collects the rows of one step."""

    policy: Policy
    _rows: dict[str, int] = field(default_factory=dict)
    _start: list[int] = field(default_factory=list)
    _num_spilled: list[int] = field(default_factory=list)
    _spills: list[bool] = field(default_factory=list)
    _separators: dict[int, IntArray] = field(default_factory=dict)
    _snapshots: dict[int, tuple[PlannedSnapshot, ...]] = field(default_factory=dict)

    def add(
        self,
        request_id: str,
        index: SeparatorIndex,
        token_ids: Sequence[int],
        start: int,
        num_new_tokens: int,
        snapshots: tuple[PlannedSnapshot, ...] = (),
    ) -> None:
        """Add the request that computes positions [start, start + num_new_tokens).

        ``token_ids`` must be known up to start + num_new_tokens for several tokens or with
        snapshots, and up to start + 1 - window for one: an asynchronous scheduler does not know
        the newest yet.
        """
        policy = self.policy
        row = len(self._rows)
        self._rows[request_id] = row
        left_before = layout.num_left_window(policy, start)
        left_after = layout.num_left_window(policy, start + num_new_tokens)
        needs_all = num_new_tokens > 1 or bool(snapshots)
        last = start + num_new_tokens if needs_all else left_after
        index.extend(token_ids, last)
        num_spilled = index.count_below(left_before)
        num_known = index.count_below(last)
        self._start.append(start)
        self._num_spilled.append(num_spilled)
        leaves = num_new_tokens == 1 and index.count_below(left_after) > num_spilled
        self._spills.append(leaves)
        if needs_all:
            self._separators[row] = index.positions(num_spilled, num_known)
        if snapshots:
            self._snapshots[row] = snapshots

    def build(self) -> StepPlan:
        """The plan of the rows added so far."""
        return StepPlan(
            rows=self._rows,
            start=np.array(self._start, dtype=np.int64),
            num_spilled=np.array(self._num_spilled, dtype=np.int64),
            spills=np.array(self._spills, dtype=np.bool_),
            separators=self._separators,
            snapshots=self._snapshots,
        )

    def build_after(self, decodes: StepPlan) -> StepPlan:
        """The rows of ``decodes``, which have neither separators nor snapshots, then these."""
        own, offset = self.build(), len(decodes.rows)
        return StepPlan(
            rows=decodes.rows | {name: offset + row for name, row in own.rows.items()},
            start=np.concatenate([decodes.start, own.start]),
            num_spilled=np.concatenate([decodes.num_spilled, own.num_spilled]),
            spills=np.concatenate([decodes.spills, own.spills]),
            separators={offset + row: found for row, found in own.separators.items()},
            snapshots={offset + row: made for row, made in own.snapshots.items()},
        )
