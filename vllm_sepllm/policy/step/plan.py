"""Plan of a step: what workers must know of each scheduled request, made by the scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.epochs import Renumbering
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.staging import Commit, Staged
from vllm_sepllm.policy.visibility import BatchPolicy, BoolArray, IntArray, Policy


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """A checkpoint that a step leaves (policy/step/checkpoint.py).

    Attributes:
        position: tokens of the request that it stands for; the step passes or reaches it.
        blocks: KV cache group -> compact block index -> block id, those that the checkpoint has
            to itself.
    """

    position: int
    blocks: dict[int, dict[int, int]]


class ListedRow(NamedTuple):  # a dataclass takes twice as long to pickle
    """What the plan of a row lists beside its numbers.

    Attributes:
        separators: positions of its separators in [max(a, i0-n), i1).
        checkpoints: that the step leaves.
        commit: tokens of the step before that turned out right (policy/step/staging.py).
        staged: where the step leaves its proposals, if it has drafts beyond a + n.
    """

    separators: IntArray
    checkpoints: tuple[PlannedCheckpoint, ...] = ()
    commit: Commit | None = None
    staged: Staged | None = None


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the positions of rows differ from those in the text (policy/epochs.py).

    Attributes:
        shift: [num_rows], what is subtracted from the positions of the row's tokens.
        renumber: row -> what its entries go through first, for rows that begin an epoch.
    """

    shift: IntArray
    renumber: dict[int, Renumbering]

    def of(self, order: IntArray) -> "Positions":
        """Those of the rows in ``order``."""
        return Positions(self.shift[order], _reordered(self.renumber, order))


@dataclass(frozen=True, slots=True)
class HostTransfers:
    """Blocks that a step moves between device and host memory before all else that it does.

    Attributes:
        saves: host slot -> block whose content goes there.
        loads: block -> host slot whose content goes there, after the saves.
    """

    saves: dict[int, int]
    loads: dict[int, int]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One row per scheduled request, in any order.

    Attributes:
        rows: request id -> row.
        start: [num_rows], tokens computed before the step: i0.
        num_spilled: [num_rows], separators that left the window before the step.
        spills: [num_rows], for a row of one token: whether the token it overwrites is a separator.
        policy: a, n and s of the rows.
        listed: row -> what is listed of it, for rows of several tokens, with checkpoints or in a
            step with drafts; other rows of one token are absent.
        positions: of an engine that renumbers them; None: those of the text.
        host: what moves to and from host memory; None: nothing.
    """

    rows: dict[str, int]
    start: IntArray
    num_spilled: IntArray
    spills: BoolArray
    policy: BatchPolicy
    listed: dict[int, ListedRow] = field(default_factory=dict)
    positions: Positions | None = None
    host: HostTransfers | None = None

    def of(self, order: IntArray, group_id: int) -> "BatchRows":
        """The rows in ``order``, for a KV cache group."""
        return BatchRows(
            group_id=group_id,
            start=self.start[order],
            num_spilled=self.num_spilled[order],
            spills=self.spills[order],
            policy=self.policy.of_rows(order),
            listed=_reordered(self.listed, order),
            positions=None if self.positions is None else self.positions.of(order),
        )


Item = TypeVar("Item")


def _reordered(items: dict[int, Item], order: IntArray) -> dict[int, Item]:
    """``items`` by their place in ``order``."""
    if not items:  # a step of single tokens has none
        return {}
    return {row: items[old] for row, old in enumerate(order.tolist()) if old in items}


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The plan in the order of a model runner's batch, for one KV cache group; as StepPlan."""

    group_id: int
    start: IntArray
    num_spilled: IntArray
    spills: BoolArray
    policy: BatchPolicy
    listed: dict[int, ListedRow]
    positions: Positions | None = None


@dataclass(slots=True)
class StepPlanBuilder:
    """Collects the rows of one step; ``policy`` is the engine's."""

    policy: Policy
    _rows: dict[str, int] = field(default_factory=dict)
    _start: list[int] = field(default_factory=list)
    _num_spilled: list[int] = field(default_factory=list)
    _policies: list[Policy] = field(default_factory=list)
    _spills: list[bool] = field(default_factory=list)
    _listed: dict[int, ListedRow] = field(default_factory=dict)

    def add(
        self,
        request_id: str,
        index: SeparatorIndex,
        token_ids: Sequence[int],
        start: int,
        num_new_tokens: int,
        checkpoints: tuple[PlannedCheckpoint, ...] = (),
    ) -> None:
        """Add the request that computes positions [start, start + num_new_tokens).

        ``token_ids`` must be known up to start + num_new_tokens for several tokens or with
        checkpoints, and up to start + 1 - window for one: an asynchronous scheduler does not know
        the newest yet.
        """
        policy = index.policy
        row = len(self._rows)
        self._rows[request_id] = row
        end = start + num_new_tokens
        needs_all = num_new_tokens > 1 or bool(checkpoints)
        index.extend(token_ids, end if needs_all else layout.num_left_window(policy, end))
        num_spilled = index.num_spilled(start)
        self._start.append(start)
        self._num_spilled.append(num_spilled)
        self._policies.append(policy)
        leaves = num_new_tokens == 1 and index.num_spilled(end) > num_spilled
        self._spills.append(leaves)
        if needs_all:
            separators = index.positions(num_spilled, index.count_below(end))
            self._listed[row] = ListedRow(separators, checkpoints)

    def add_proposing(
        self,
        request_id: str,
        index: SeparatorIndex,
        token_ids: Sequence[int],
        start: int,
        commit: Commit | None,
        staged: Staged | None,
    ) -> None:
        """Add a request whose step is decided by speculative decoding.

        Every row lists its separators, those of one token too: rows with drafts come before them
        in a batch, and what follows a prefill row is one. Drafts are never far from their queries,
        so it does not matter whether they are separators: ``token_ids`` must be known up to start.
        """
        row = len(self._rows)
        known = min(len(token_ids), start + 1)
        self.add(request_id, index, token_ids, start, 1)
        index.extend(token_ids, known)
        separators = index.positions(index.num_spilled(start), index.count_below(known))
        self._listed[row] = ListedRow(separators, commit=commit, staged=staged)

    def build(self) -> StepPlan:
        """The plan of the rows added so far."""
        return StepPlan(
            rows=self._rows,
            start=np.array(self._start, dtype=np.int64),
            num_spilled=np.array(self._num_spilled, dtype=np.int64),
            spills=np.array(self._spills, dtype=np.bool_),
            policy=BatchPolicy.of(self._policies, self.policy),
            listed=self._listed,
        )
