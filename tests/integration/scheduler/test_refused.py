"""A request whose policy is refused ends with an error, whichever vLLM lists such requests."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.outputs import RequestError
from vllm.v1.outputs import ModelRunnerOutput

from tests.support.schedulers import Run, Setting, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def outputs(run: Run) -> list[Any]:
    """What vLLM tells the front end after a step."""
    output = run.scheduler.schedule()
    names = list(output.num_scheduled_tokens)
    rows = {name: row for row, name in enumerate(names)}
    made = ModelRunnerOutput(names, rows, [[2] for _ in names])
    return [
        o for core in run.scheduler.update_from_output(output, made).values() for o in core.outputs
    ]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_it_ends_alone(model: Path, kind: str) -> None:
    """Under vLLM 0.33 with the reason; the other request of the step is served."""
    run = Run(Setting(model, kind))
    served = run.arrive([2] * 5, 9)
    refused = run.arrive([2] * 5, 9, sepllm_window=-1)
    told = {output.request_id: output for output in outputs(run)}
    assert told[refused].finish_reason is not None
    assert told[served].new_token_ids == [2]
    assert list(run.scheduler.requests) == [served]
    if isinstance(run.scheduler.grammar_compile_error_reqs, dict):
        assert "sepllm_window" in told[refused].error.message


def test_the_reason_goes_where_vllm_0_33_takes_it(model: Path) -> None:
    run = Run(Setting(model))
    refused = run.arrive([2] * 5, 9, sepllm_window=-1)
    failed: dict[str, RequestError] = {}
    run.scheduler.grammar_compile_error_reqs = failed
    run.scheduler.schedule()
    assert list(failed) == [refused]
    assert failed[refused].code == "validation_error"
    assert "sepllm_window" in failed[refused].message
