"""Plans the steps of a scheduler: decode rows all at once, others one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
from vllm_sepllm.policy.step.plan import PlannedCheckpoint, StepPlan, StepPlanBuilder
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray, Policy

# request, start and end of its step -> checkpoints that the step leaves
PlanCheckpoints = Callable[[Request, int, int], tuple[PlannedCheckpoint, ...]]

_NUM_COMPUTED = attrgetter("num_computed_tokens")  # a step reads it of every request


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests that were scheduled together, as long as none comes, goes or is truncated.

    Attributes:
        version: of the requests' separators when the rest was looked up.
        ids: [num_rows] request ids.
        rows: request id -> row.
        requests: [num_rows].
        slots: [num_rows], in the table of decodes.
        policy: of the rows.
    """

    version: int
    ids: list[str]
    rows: dict[str, int]
    requests: list[Request]
    slots: IntArray
    policy: BatchPolicy

    def subset(self, chosen: list[int]) -> "_Batch":
        """The batch of some of its rows."""
        ids = [self.ids[row] for row in chosen]
        return _Batch(
            version=self.version,
            ids=ids,
            rows={request_id: row for row, request_id in enumerate(ids)},
            requests=[self.requests[row] for row in chosen],
            slots=self.slots[chosen],
            policy=self.policy.of_rows(chosen),
        )


class StepPlanner:
    """Keeps what steps have in common; a plan depends on token ids and positions alone."""

    def __init__(
        self,
        separators: RequestSeparators,
        plan_checkpoints: PlanCheckpoints,
        interval: Callable[[Policy], int],
        max_proposed: int = 0,
    ) -> None:
        """Plan the steps of one scheduler.

        Args:
            separators: of its requests.
            plan_checkpoints: says which checkpoints a step leaves; asked of every step that leaves
                the rows of ``DecodeTable``.
            interval: of a policy: beyond a + n tokens, decode steps leave checkpoints at its
                multiples only.
            max_proposed: most tokens that a step of speculative decoding proposes; 0: none.
        """
        self._separators = separators
        self._plan_checkpoints = plan_checkpoints
        self._interval = interval
        self._max_proposed = max_proposed
        nobody = BatchPolicy.of([], separators.policy)
        self._batch = _Batch(0, [], {}, [], np.zeros(0, dtype=np.int64), nobody)

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """The plan of a step, while ``num_computed_tokens`` still is the start of the step."""
        if self._max_proposed:
            return self._plan_proposing(output)
        num_new = output.num_scheduled_tokens
        batch = self._batch_of(list(num_new))
        others: list[int] = []
        if output.total_num_scheduled_tokens > len(num_new):
            others = [row for row, size in enumerate(num_new.values()) if size > 1]
        start = np.fromiter(map(_NUM_COMPUTED, batch.requests), np.int64, len(batch.ids))
        for row in self._separators.decodes.unknown(batch.slots, start).tolist():
            if num_new[batch.ids[row]] == 1 and not self._look_up(batch, row):
                others.append(row)
        if not others:
            return self._decodes(batch, start)
        single = sorted(set(range(len(start))).difference(others))
        builder = StepPlanBuilder(self._separators.policy)
        for row in others:
            self._add(builder, batch.requests[row], num_new[batch.ids[row]])
        return builder.build_after(self._decodes(batch.subset(single), start[single]))

    def _batch_of(self, ids: list[str]) -> _Batch:
        batch, separators = self._batch, self._separators
        if ids == batch.ids and batch.version == separators.version:
            return batch
        slots = np.array([separators.slot(request_id) for request_id in ids], dtype=np.int64)
        self._batch = _Batch(
            version=separators.version,
            ids=ids,
            rows={request_id: row for row, request_id in enumerate(ids)},
            requests=[separators.request(request_id) for request_id in ids],
            slots=slots,
            policy=BatchPolicy.of([separators.policy_of(name) for name in ids], separators.policy),
        )
        return self._batch

    def _look_up(self, batch: _Batch, row: int) -> bool:
        """Prepare a step of one token; False if it may leave a checkpoint: it is planned alone."""
        request = batch.requests[row]
        start = request.num_computed_tokens
        index = self._separators.index(request.request_id)
        interval = self._interval(index.policy)
        # the step that reaches position P = start + 1 leaves the checkpoint at P
        stop = (start + interval) // interval * interval - 1
        is_dense = start < index.policy.num_dense
        if is_dense or start < request.num_prompt_tokens or start == stop:
            return False
        self._separators.decodes.look_up(
            int(batch.slots[row]), index, request._all_token_ids, start, stop
        )
        return True

    def _decodes(self, batch: _Batch, start: IntArray) -> StepPlan:
        num_spilled, spills = self._separators.decodes.step(batch.slots, start)
        return StepPlan(batch.rows, start, num_spilled, spills, batch.policy)

    def _add(self, plan: StepPlanBuilder, request: Request, num_new_tokens: int) -> None:
        start = request.num_computed_tokens
        plan.add(
            request.request_id,
            self._separators.index(request.request_id),
            request._all_token_ids,
            start,
            num_new_tokens,
            self._plan_checkpoints(request, start, start + num_new_tokens),
        )

    def _plan_proposing(self, output: SchedulerOutput) -> StepPlan:
        """A step of speculative decoding, in which the next step of a request starts anywhere."""
        plan = StepPlanBuilder(self._separators.policy)
        drafts = output.scheduled_spec_decode_tokens
        for name, num_new_tokens in output.num_scheduled_tokens.items():
            request = self._separators.request(name)
            if name not in drafts and num_new_tokens > 1:
                assert name not in self._separators.staged, "a prefill follows no drafts"
                self._add(plan, request, num_new_tokens)
                continue
            start, num_drafts = request.num_computed_tokens, len(drafts.get(name, ()))
            commit, staged = self._separators.propose(name, start, num_drafts, self._max_proposed)
            index = self._separators.index(name)
            plan.add_proposing(name, index, request._all_token_ids, start, commit, staged)
        return plan.build()
