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
class BatchRows:
    """The plan in the order of the model runner's batch; arrays are [num_requests]."""

    start: IntArray
    num_spilled: IntArray
    spills: BoolArray
    separators: tuple[IntArray | None, ...]
    snapshots: tuple[tuple[PlannedSnapshot, ...], ...]


class CurrentStep:
    """What the builders of one worker may ask about the step that is being executed."""

    def __init__(self, request_ids: Callable[[], Sequence[str]]) -> None:
        """``request_ids`` gives the request of each row of the runner's batch."""
        self._request_ids = request_ids
        self._plan: StepPlan | None = None
        # the last batch: most steps have the same requests in the same order
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._order = np.zeros(0, dtype=np.int64)

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

    def rows(self, num_requests: int) -> BatchRows:
        """The plan of the batch's first ``num_requests`` rows."""
        plan = self._plan
        assert plan is not None, "there is no plan outside a step"
        order = self._order_of(list(self._request_ids()[:num_requests]), plan.rows)
        separators: list[IntArray | None] = [None] * len(order)
        snapshots: list[tuple[PlannedSnapshot, ...]] = [()] * len(order)
        if plan.separators or plan.snapshots:
            for row, planned in enumerate(order.tolist()):
                separators[row] = plan.separators.get(planned)
                snapshots[row] = plan.snapshots.get(planned, ())
        return BatchRows(
            start=plan.start[order],
            num_spilled=plan.num_spilled[order],
            spills=plan.spills[order],
            separators=tuple(separators),
            snapshots=tuple(snapshots),
        )

    def _order_of(self, ids: list[str], rows: dict[str, int]) -> IntArray:
        """The plan's row of each request, [num_requests]."""
        if ids != self._ids or (rows is not self._rows and rows != self._rows):
            self._ids, self._rows = ids, rows
            self._order = np.array([rows[request_id] for request_id in ids], dtype=np.int64)
        return self._order
