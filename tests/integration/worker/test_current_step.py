"""The plan is current in every step that a runner executes for the scheduler, whoever asks it."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_sepllm.integration.wire.plan import attach_plan
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy


def scheduler_output(num_tokens: int) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    made.total_num_scheduled_tokens = num_tokens
    return made


def runner(step: CurrentStep) -> Any:
    """Executes by saying whether it sees a plan."""

    def execute_model(
        _output: SchedulerOutput, _tensors: object = None, dummy_run: bool = False
    ) -> tuple[bool, bool]:
        return step.is_dummy, dummy_run

    made = SimpleNamespace(execute_model=execute_model)
    step.plan_runs_of(made)
    return made


def test_a_step_of_the_scheduler_has_its_plan() -> None:
    step = CurrentStep()
    output = scheduler_output(3)
    attach_plan(output, StepPlanBuilder(Policy(4, 16, None)).build())
    # as vLLM's compiled Ray graph calls it, and as its worker does
    assert runner(step).execute_model(output, None) == (False, False)
    assert runner(step).execute_model(output) == (False, False)
    assert step.is_dummy


def test_a_step_that_a_runner_makes_up_has_none() -> None:
    assert runner(CurrentStep()).execute_model(scheduler_output(3), dummy_run=True) == (True, True)
    assert runner(CurrentStep()).execute_model(scheduler_output(0)) == (True, False)


def test_a_step_without_tokens_has_none() -> None:
    """Its batch is made up, though the runner holds requests; each step of ours has a plan."""
    output = scheduler_output(0)
    attach_plan(output, StepPlanBuilder(Policy(4, 16, None)).build())
    assert runner(CurrentStep()).execute_model(output) == (True, False)


def test_a_step_of_another_scheduler_is_refused() -> None:
    with pytest.raises(RuntimeError, match="a step without a plan"):
        runner(CurrentStep()).execute_model(scheduler_output(3))
