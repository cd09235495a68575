"""The plan of the step that a worker is executing, for its metadata builders."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_sepllm.integration.wire.plan import attached_plan
from vllm_sepllm.integration.worker.host_blocks import HostBlocks
from vllm_sepllm.policy.step.plan import BatchRows, ListedRow, StepPlan
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray, Policy


class CurrentStep:
    """What the builders of one worker may ask about the step that is being executed."""

    def __init__(self) -> None:
        self._plan: StepPlan | None = None
        self._afterwards: list[Callable[[], None]] = []
        # evicted blocks; None: the engine keeps none in host memory
        self.host_blocks: HostBlocks | None = None
        # the engine's policy, while the worker warms up
        self._warm_up_policy: Policy | None = None
        # the last batch: most steps have the same requests in the same order
        self._ids: Sequence[str] = ()
        self._rows: dict[str, int] = {}
        self._order = np.zeros(0, dtype=np.int64)

    @contextmanager
    def warm_up(self, policy: Policy) -> Iterator[None]:
        """Accept steps that the worker makes up itself: they have requests, but no scheduler.

        ``policy`` is the engine's.
        """
        self._warm_up_policy = policy
        try:
            yield
        finally:
            self._warm_up_policy = None

    @contextmanager
    def of(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        """Make the plan of ``scheduler_output`` current.

        Raises:
            RuntimeError: if tokens are scheduled without a plan: another scheduler is at work.
        """
        plan = attached_plan(scheduler_output)
        is_run = scheduler_output.total_num_scheduled_tokens > 0
        if plan is None and is_run and self._warm_up_policy is not None:
            plan = _warm_up_plan(scheduler_output, self._warm_up_policy)
        if plan is None and is_run:
            raise RuntimeError(
                "sepllm's worker got a step without a plan: the engine does not run "
                "SepLLMScheduler; select sepllm through EngineArgs, vllm.LLM or vllm serve"
            )
        if plan is not None and plan.host is not None:
            assert self.host_blocks is not None, "the scheduler saves blocks if the workers do"
            self.host_blocks.move(plan.host)
        # without tokens no request runs, and a batch that a model runner makes up then has no plan
        # (vLLM: Model Runner V1 in an external launcher, to keep data-parallel ranks together)
        self._plan = plan if is_run else None
        try:
            yield
            for work in self._afterwards:
                work()
        finally:
            self._plan = None
            self._afterwards = []

    def plan_runs_of(self, runner: Any) -> None:
        """Make the plan current whenever the model runner executes a step of the scheduler's.

        Not when the worker does: vLLM's Ray executor with compiled graphs calls the runner itself.
        """
        execute_model = runner.execute_model

        def execute_model_with_plan(
            scheduler_output: SchedulerOutput, *args: Any, dummy_run: bool = False, **kwargs: Any
        ) -> Any:
            if dummy_run:  # Model Runner V2 makes up a step to warm up with
                return execute_model(scheduler_output, *args, dummy_run=True, **kwargs)
            with self.of(scheduler_output):
                return execute_model(scheduler_output, *args, **kwargs)

        runner.execute_model = execute_model_with_plan

    def afterwards(self, work: Callable[[], None]) -> None:
        """Do ``work`` once the step's forward has been launched."""
        self._afterwards.append(work)

    @property
    def is_dummy(self) -> bool:
        """Whether vLLM runs the model without requests: profiling, warm-up, graph capture."""
        return self._plan is None

    @property
    def is_made_up(self) -> bool:
        """Whether no scheduler planned the step, so that its positions mean nothing."""
        return self._plan is None or self._warm_up_policy is not None

    def rows(self, request_ids: Sequence[str], group_id: int) -> BatchRows:
        """The plan of these requests, in the order of the batch, for a KV cache group."""
        assert self._plan is not None, "there is no plan outside a step"
        return self._plan.of(self._order_of(list(request_ids), self._plan.rows), group_id)

    def shift_of(self, request_ids: Sequence[str]) -> IntArray:
        """[num_requests] what is subtracted from the positions of each request's tokens."""
        assert self._plan is not None, "there is no plan outside a step"
        assert self._plan.positions is not None, "the scheduler renumbers if the workers do"
        return self._plan.positions.shift[self._order_of(list(request_ids), self._plan.rows)]

    def _order_of(self, ids: list[str], rows: dict[str, int]) -> IntArray:
        """The plan's row of each request, [num_requests]."""
        if ids != self._ids or (rows is not self._rows and rows != self._rows):
            self._ids, self._rows = ids, rows
            self._order = np.array([rows[request_id] for request_id in ids], dtype=np.int64)
        return self._order


def _warm_up_plan(scheduler_output: SchedulerOutput, policy: Policy) -> StepPlan:
    """The plan of requests without a separator (vLLM: v1/worker/gpu/warmup.py makes such steps)."""
    cached = scheduler_output.scheduled_cached_reqs
    start = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    start |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    names = list(scheduler_output.num_scheduled_tokens)
    nothing = ListedRow(separators=np.zeros(0, dtype=np.int64))
    return StepPlan(
        rows={name: row for row, name in enumerate(names)},
        start=np.array([start[name] for name in names], dtype=np.int64),
        num_spilled=np.zeros(len(names), dtype=np.int64),
        spills=np.zeros(len(names), dtype=np.bool_),
        policy=BatchPolicy.of([policy] * len(names), policy),
        listed=dict.fromkeys(range(len(names)), nothing),
    )
