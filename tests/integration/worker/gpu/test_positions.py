"""Positions that a CUDA graph captured stay where they are, and vLLM's are left alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_sepllm.integration.wire.plan import attach_plan
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.integration.worker.gpu.positions import shift_positions
from vllm_sepllm.policy.step.plan import Positions, StepPlan
from vllm_sepllm.policy.visibility import BatchPolicy, Policy

POLICY = Policy(2, 6, 8, 100)
NAMES = ("a", "b", "c")


@pytest.fixture
def step() -> CurrentStep:
    return CurrentStep()


@pytest.fixture
def runner(step: CurrentStep) -> Any:
    """Model Runner V2, as far as its inputs go, with the model state of most models."""
    state = DefaultModelState.__new__(DefaultModelState)
    state.rope_state = state.prompt_embeds_state = None
    state.supports_mm_inputs = False
    buffers = InputBuffers(max_num_reqs=8, max_num_tokens=16, device=torch.device("cpu"))
    made = SimpleNamespace(model_state=state, input_buffers=buffers)
    shift_positions(made, step)
    return made


def batch(runner: Any, num_new: list[int], first: list[int], padded: int) -> Any:
    """A batch of NAMES; vLLM leaves the positions of padding as they were."""
    num_tokens = sum(num_new)
    positions = runner.input_buffers.positions[:padded].fill_(99_999)
    rows = [torch.arange(one, one + size) for one, size in zip(first, num_new, strict=True)]
    positions[:num_tokens] = torch.cat(rows)
    return SimpleNamespace(
        req_ids=list(NAMES[: len(num_new)]),
        num_scheduled_tokens=np.array(num_new, dtype=np.int32),
        num_tokens=num_tokens,
        num_tokens_after_padding=padded,
        positions=positions,
    )


def scheduled(shift: list[int], start: list[int]) -> SchedulerOutput:
    """A step of NAMES, planned in the reverse order."""
    nothing = np.zeros(len(shift), dtype=np.int64)
    plan = StepPlan(
        rows={name: row for row, name in enumerate(reversed(NAMES))},
        start=np.array(start[::-1]),
        num_spilled=nothing,
        spills=nothing > 0,
        policy=BatchPolicy.of([POLICY] * len(shift), POLICY),
        positions=Positions(np.array(shift[::-1]), {}),
    )
    output = SchedulerOutput.make_empty()
    output.total_num_scheduled_tokens = len(shift)
    attach_plan(output, plan)
    return output


def test_a_captured_graph_reads_what_later_steps_fill(runner: Any, step: CurrentStep) -> None:
    state = runner.model_state
    captured = state.prepare_dummy_inputs(4, 8)["positions"]
    assert captured.tolist() == [0] * 8
    with step.of(scheduled([0, 0, 0], [20, 30, 40])):
        state.prepare_inputs(batch(runner, [4, 2, 2], [20, 30, 40], padded=8), None)
    assert captured.tolist() == [20, 21, 22, 23, 30, 31, 40, 41]
    given = batch(runner, [1, 1, 4], [7, 250, 400], padded=8)
    in_text = given.positions.clone()
    with step.of(scheduled([0, 200, 330], [7, 250, 400])):
        made = state.prepare_inputs(given, None)["positions"]
    assert made.data_ptr() == captured.data_ptr()
    # the padding of a graph reads a row of the rotary table, which vLLM's stale 99,999 has not
    assert captured.tolist() == [7, 50, 70, 71, 72, 73, 0, 0]
    assert torch.equal(given.positions, in_text), "sampling draws by positions in the text"


def test_runs_without_requests_have_the_first_position(runner: Any, step: CurrentStep) -> None:
    """Contexts that vLLM makes up, to profile or to warm up, may be longer than the table."""
    state = runner.model_state
    given = batch(runner, [1, 5], [300, 0], padded=8)
    assert state.prepare_inputs(given, None)["positions"].tolist() == [0] * 8
    made_up = SchedulerOutput.make_empty()
    made_up.num_scheduled_tokens = {"a": 1, "b": 5}
    made_up.total_num_scheduled_tokens = 6
    made_up.scheduled_cached_reqs.req_ids = ["a", "b"]
    made_up.scheduled_cached_reqs.num_computed_tokens = [300, 0]
    with step.warm_up(POLICY), step.of(made_up):
        assert state.prepare_inputs(given, None)["positions"].tolist() == [0] * 8


def test_a_model_with_positions_of_its_own_is_no_model_of_ours(
    runner: Any, step: CurrentStep
) -> None:
    rope = SimpleNamespace(get_positions=lambda num_tokens: torch.zeros(3, num_tokens))
    runner.model_state.rope_state = rope
    with pytest.raises(AssertionError, match="positions of their own are refused"):
        runner.model_state.prepare_dummy_inputs(4, 8)
