"""The plan's way from the scheduler's output to the metadata builders of one worker."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_sepllm.policy.plan import PlannedSnapshot, StepPlan
from vllm_sepllm.policy.visibility import BoolArray, IntArray

# vLLM's SchedulerOutput has no field for plugins; it is a plain dataclass, so an attribute of our
# own travels with it through every executor's pickling.
_PLAN_ATTRIBUTE = "sepllm_plan"


def attach_plan(scheduler_output: SchedulerOutput, plan: StepPlan) -> None:
    """Send ``plan`` to the workers with this step."""
    setattr(scheduler_output, _PLAN_ATTRIBUTE, plan)


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    """A PlannedSnapshot as one KV cache group sees it: compact block index -> block id."""

    position: int
    blocks: dict[int, int]


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The plan in the order of the model runner's batch; arrays are [num_requests]."""

    start: IntArray
    num_spilled: IntArray
    spills: BoolArray
    separators: tuple[IntArray | None, ...]
    snapshots: tuple[tuple[GroupSnapshot, ...], ...]


class CurrentStep:
    """What the builders of one worker may ask about the step that is being executed."""

    def __init__(self, request_ids: Callable[[], Sequence[str]]) -> None:
        """``request_ids`` gives the request of each row of the runner's batch."""
        self._request_ids = request_ids
        self._plan: StepPlan | None = None

    @contextmanager
    def of(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        """Make the plan of ``scheduler_output`` current.

        Raises:
            RuntimeError: if tokens are scheduled without a plan: another scheduler is at work.
        """
        plan = getattr(scheduler_output, _PLAN_ATTRIBUTE, None)
        if plan is None and scheduler_output.total_num_scheduled_tokens > 0:
            raise RuntimeError(
                "sepllm's worker got a step without a plan: the engine does not run "
                "SepLLMScheduler; select sepllm through EngineArgs, vllm.LLM or vllm serve"
            )
        self._plan = plan
        try:
            yield
        finally:
            self._plan = None

    @property
    def is_dummy(self) -> bool:
        """Whether vLLM runs the model without requests: profiling, warm-up, graph capture."""
        return self._plan is None

    def rows(self, num_requests: int, group_id: int) -> BatchRows:
        """The plan of the batch's first ``num_requests`` rows for a KV cache group."""
        plan = self._plan
        assert plan is not None, "there is no plan outside a step"
        order = np.array([plan.rows[r] for r in self._request_ids()[:num_requests]], dtype=np.int64)
        return BatchRows(
            start=plan.start[order],
            num_spilled=plan.num_spilled[order],
            spills=plan.spills[order],
            separators=tuple(plan.separators.get(row) for row in order.tolist()),
            snapshots=tuple(
                _of_group(plan.snapshots.get(row, ()), group_id) for row in order.tolist()
            ),
        )


def _of_group(planned: Sequence[PlannedSnapshot], group_id: int) -> tuple[GroupSnapshot, ...]:
    parts = (GroupSnapshot(p.position, p.blocks[group_id]) for p in planned)
    return tuple(part for part in parts if part.blocks)
