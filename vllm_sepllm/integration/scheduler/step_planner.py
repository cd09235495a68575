"""Planner of a scheduler's steps: decode rows all at once, others one by one."""

from collections.abc import Callable, Sequence
from operator import attrgetter

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_sepllm.integration.scheduler.live_requests import Batch, LiveRequest, LiveRequests
from vllm_sepllm.policy.epochs import Epochs
from vllm_sepllm.policy.step.plan import (
    ListedRow,
    PlannedCheckpoint,
    Positions,
    StepPlan,
    StepPlanBuilder,
)
from vllm_sepllm.policy.step.staging import propose
from vllm_sepllm.policy.visibility import IntArray, Policy

# request, start and end of its step -> checkpoints that the step leaves
PlanCheckpoints = Callable[[LiveRequest, int, int], tuple[PlannedCheckpoint, ...]]

_NUM_COMPUTED = attrgetter("num_computed_tokens")  # a step reads it of every request


class StepPlanner:
    """Plans each step from token ids and positions alone."""

    def __init__(
        self,
        live: LiveRequests,
        plan_checkpoints: PlanCheckpoints,
        interval: Callable[[Policy], int],
        max_proposed: int = 0,
        block_size: int | None = None,
    ) -> None:
        """Plan the steps of one scheduler.

        Args:
            live: its requests.
            plan_checkpoints: says which checkpoints a step leaves; asked of every step that leaves
                the rows of ``DecodeTable``.
            interval: policy -> tokens between its regular checkpoints; beyond a + n tokens, decode
                steps leave checkpoints at multiples of it only.
            max_proposed: most tokens that a step of speculative decoding proposes; 0: none.
            block_size: tokens of a block that the prefix cache finds; up to a + n tokens, decode
                steps have something to leave as one is full. None: it finds none.
        """
        self._live = live
        self._plan_checkpoints = plan_checkpoints
        self._interval = interval
        self._max_proposed = max_proposed
        self._block_size = block_size

    def plan(self, output: SchedulerOutput) -> StepPlan:
        """The plan of a step, while ``num_computed_tokens`` still is the start of the step."""
        return self._plan_proposing(output) if self._max_proposed else self._plan_certain(output)

    def _plan_certain(self, output: SchedulerOutput) -> StepPlan:
        """The plan of a step without drafts."""
        num_new = output.num_scheduled_tokens
        batch = self._live.batch(list(num_new))
        others: list[int] = []
        if output.total_num_scheduled_tokens > len(num_new):
            others = [row for row, size in enumerate(num_new.values()) if size > 1]
        start = np.fromiter(map(_NUM_COMPUTED, batch.requests), np.int64, len(batch.ids))
        decodes = self._live.decodes
        for row in decodes.unknown(batch.slots, start).tolist():
            if num_new[batch.ids[row]] == 1 and not self._look_up(batch.live[row]):
                others.append(row)
        listed: dict[int, ListedRow] = {}
        if others:
            single = np.delete(np.arange(len(start)), others)
            num_spilled, spills = np.zeros_like(start), np.zeros(len(start), dtype=np.bool_)
            num_spilled[single], spills[single] = decodes.step(batch.slots[single], start[single])
            builder = StepPlanBuilder(self._live.engine)
            for row in others:
                self._add(builder, batch.live[row], num_new[batch.ids[row]])
            own = builder.build()
            num_spilled[others], spills[others] = own.num_spilled, own.spills
            listed = {others[row]: item for row, item in own.listed.items()}
        else:
            num_spilled, spills = decodes.step(batch.slots, start)
        positions = self._positions(batch, start)
        return StepPlan(batch.rows, start, num_spilled, spills, batch.policy, listed, positions)

    def _positions(self, batch: Batch, start: IntArray) -> Positions | None:
        if self._live.engine.max_position is None:
            return None

        def of_row(row: int) -> tuple[Epochs, Sequence[int]]:
            live = batch.live[row]
            assert live.epochs is not None, "the engine's max_position is every request's"
            return live.epochs, live.request._all_token_ids

        return self._live.epochs.step(batch.slots, start, of_row)

    def _look_up(self, live: LiveRequest) -> bool:
        """Prepare a step of one token; False if it may leave a checkpoint: it is planned alone."""
        start = live.request.num_computed_tokens
        stop = self._next_alone(live.policy, start)
        if start < live.request.num_prompt_tokens or start == stop:
            return False
        token_ids = live.request._all_token_ids
        self._live.decodes.look_up(live.slot, live.index, token_ids, start, stop)
        return True

    def _next_alone(self, policy: Policy, start: int) -> int:
        """Start of the next decode step, from ``start`` on, that may leave something."""
        if start >= policy.num_dense:
            interval = self._interval(policy)
            # the step that reaches position P = start + 1 leaves the checkpoint at P
            return (start + interval) // interval * interval - 1
        if self._block_size is None:
            return policy.num_dense
        # a block gets its key from the step that fills it, an asynchronous one is told a step later
        offset = start % self._block_size
        wait = 0 if offset == 0 else self._block_size - 1 - offset
        return min(start + wait, policy.num_dense)

    def _add(self, plan: StepPlanBuilder, live: LiveRequest, num_new_tokens: int) -> None:
        request = live.request
        start = request.num_computed_tokens
        plan.add(
            request.request_id,
            live.index,
            request._all_token_ids,
            start,
            num_new_tokens,
            self._plan_checkpoints(live, start, start + num_new_tokens),
        )

    def _plan_proposing(self, output: SchedulerOutput) -> StepPlan:
        """The plan of a step with drafts: how many are accepted says where the next step starts."""
        plan = StepPlanBuilder(self._live.engine)
        drafts = output.scheduled_spec_decode_tokens
        for name, num_new_tokens in output.num_scheduled_tokens.items():
            live = self._live[name]
            if name not in drafts and num_new_tokens > 1:
                assert live.holding.staged is None, "a prefill follows no drafts"
                self._add(plan, live, num_new_tokens)
                continue
            start, num_drafts = live.request.num_computed_tokens, len(drafts.get(name, ()))
            live.num_spilled(start)  # takes in the tokens that have left the window
            commit, staged = propose(
                live.index, live.holding.staged, start, num_drafts, self._max_proposed
            )
            live.holding.staged = staged
            plan.add_proposing(name, live.index, live.request._all_token_ids, start, commit, staged)
        return plan.build()
