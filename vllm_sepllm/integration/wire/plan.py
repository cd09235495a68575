"""The plan of a step on its way from the scheduler to the workers."""

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_sepllm.policy.step.plan import StepPlan

# vLLM's SchedulerOutput has no field for plugins; it is a plain dataclass, so an attribute of our
# own travels with it through every executor's pickling.
_ATTRIBUTE = "sepllm_plan"


def attach_plan(scheduler_output: SchedulerOutput, plan: StepPlan) -> None:
    """Send ``plan`` to the workers with this step."""
    setattr(scheduler_output, _ATTRIBUTE, plan)


def attached_plan(scheduler_output: SchedulerOutput) -> StepPlan | None:
    """The plan of the step; None: no SepLLMScheduler scheduled it."""
    plan: StepPlan | None = getattr(scheduler_output, _ATTRIBUTE, None)
    return plan
