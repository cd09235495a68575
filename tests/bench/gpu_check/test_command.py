"""The command around the stages: order, time limits, resuming, table, exit code."""

import json
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner, Result

from vllm_sepllm.bench.gpu_check import __main__ as command
from vllm_sepllm.bench.gpu_check.report import (
    FAILED,
    LEFT_OUT,
    PASSED,
    TIMED_OUT,
    Outcome,
    append,
    passed_before,
    render,
)
from vllm_sepllm.bench.gpu_check.stages import STAGES, Machine, Stage

H100 = Machine("cuda", (9, 0), num_gpus=8, has_flashinfer=True)
CPU = Machine("cpu")
FOUND: dict[str, Any] = {
    "errors": {
        "stock": {"mean": 0.01, "largest": 0.05},
        "sepllm": {"mean": 0.02, "largest": 0.07},
        "control": {"mean": 1.5, "largest": 9.0},
    },
    "parts": {"backend": "SepLLMTritonAttentionBackend", "runner": "V2", "graphs": "NONE"},
    "faults": [],
}


def passes(stage: Stage) -> Outcome:
    return Outcome(stage.name, PASSED, seconds=1.0, found=FOUND)


def test_stages_run_in_their_order_and_operations_come_first() -> None:
    found = list(command.outcomes_of(command.chosen_stages(None), H100, {}, passes))
    ran = [outcome.stage for outcome in found if outcome.status == PASSED]
    assert ran[0] == "operations"
    assert ran == [stage.name for stage in STAGES if stage.name != "eager-cpu"]
    chosen = command.chosen_stages("fp8, operations")
    assert [stage.name for stage in chosen] == ["operations", "fp8"]


def test_what_has_passed_is_not_run_again_and_a_failure_stops_nothing() -> None:
    ran = []

    def run(stage: Stage) -> Outcome:
        ran.append(stage.name)
        return Outcome(stage.name, FAILED if len(ran) == 1 else PASSED)

    before = {"operations": Outcome("operations", PASSED, seconds=5.0)}
    stages = command.chosen_stages("operations,eager-triton,prefix-hits")
    found = list(command.outcomes_of(stages, H100, before, run))
    assert ran == ["eager-triton", "prefix-hits"]
    assert [outcome.status for outcome in found] == [PASSED, FAILED, PASSED]


def writes(found: dict[str, Any], result: Path) -> list[str]:
    """A command that leaves a result behind, as a stage's process does."""
    code = f"from pathlib import Path; Path({str(result)!r}).write_text({json.dumps(found)!r})"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import time; time.sleep(60)", TIMED_OUT, "ended after 1 s, see "),
        ("raise SystemExit('no kernel image')", FAILED, "exit status 1: no kernel image, see "),
        ("print('nothing written')", FAILED, "exit status 0: nothing written, see "),
    ],
)
def test_a_process_that_hangs_or_fails_is_reported(
    tmp_path: Path, code: str, status: str, reason: str
) -> None:
    limit = 1.0 if status == TIMED_OUT else 60.0
    start = time.monotonic()
    found = command.run_stage(STAGES[0], [sys.executable, "-c", code], tmp_path, limit, {})
    assert (found.status, found.is_bad) == (status, True)
    assert found.reason.startswith(reason)
    assert time.monotonic() - start < 30
    assert found.log == str(tmp_path / "operations.log")


def test_a_result_counts_only_if_its_process_wrote_it(tmp_path: Path) -> None:
    result = tmp_path / "operations.json"
    found = command.run_stage(STAGES[0], writes(FOUND, result), tmp_path, 60.0, {"dtype": "x"})
    assert (found.status, found.found, found.setting) == (PASSED, FOUND, {"dtype": "x"})
    wrong = FOUND | {"faults": ["mean error 3", "no CUDA graph was captured"]}
    found = command.run_stage(STAGES[0], writes(wrong, result), tmp_path, 60.0, {})
    assert (found.status, found.reason) == (FAILED, "mean error 3; no CUDA graph was captured")
    # the result of before is not taken for that of a process that wrote none
    found = command.run_stage(STAGES[0], [sys.executable, "-c", ""], tmp_path, 60.0, {})
    assert found.status == FAILED


def test_only_passed_stages_of_the_same_setting_are_found_again(tmp_path: Path) -> None:
    file, setting = tmp_path / "results.jsonl", {"model": "m", "versions": {"vllm": "0.32.0"}}
    assert passed_before(file, setting) == {}
    good = Outcome("operations", PASSED, found=FOUND, setting=setting)
    append(file, good)
    append(file, replace(good, stage="fp8", status=FAILED))
    append(file, replace(good, stage="compiled", setting=setting | {"model": "other"}))
    with file.open("a") as lines:
        lines.write('{"stage": "speculative", "stat')  # a run that was killed here
    assert passed_before(file, setting) == {"operations": good}


def test_table_shows_errors_path_and_reason() -> None:
    out = StringIO()
    bad = Outcome("fp8", TIMED_OUT, "ended after 150 s", 150.0)
    left = Outcome("tensor-parallel", LEFT_OUT, "needs two GPUs, and torch sees 1")
    table = render([passes(STAGES[2]), bad, left])
    Console(file=out, width=200).print(table)
    lines = out.getvalue().splitlines()
    (good,) = [line for line in lines if "eager-triton" in line]
    assert "0.01 / 0.05" in good
    assert "0.02 / 0.07" in good
    assert "SepLLMTritonAttentionBackend, V2, NONE" in good
    (late,) = [line for line in lines if "fp8" in line]
    assert "timed out" in late
    assert "150" in late
    (out_line,) = [line for line in lines if "tensor-parallel" in line]
    assert "left out" in out_line
    assert "needs two GPUs" in out_line


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the command on a machine without a GPU, whose stages a function ends."""
    monkeypatch.setattr(command, "write_model", lambda folder: folder)
    monkeypatch.setattr(command, "check_model", lambda folder: None)
    monkeypatch.setattr(command, "this_machine", lambda: CPU)
    app = Typer()
    app.command()(command.main)

    def call(*arguments: str, faults: tuple[str, ...] = ()) -> Result:
        def run(stage: Stage, _command: Any, _out: Path, limit: float, setting: Any) -> Outcome:
            found = FOUND | {"limit": limit}
            status = FAILED if stage.name in faults else PASSED
            return Outcome(stage.name, status, found=found, setting=setting)

        monkeypatch.setattr(command, "run_stage", run)
        return CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])

    return call


def outcomes(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_line_a_stage_and_1_on_any_failure(invoke: Any) -> None:
    done = invoke(faults=("preemption",))
    assert done.exit_code == 1
    found = {outcome["stage"]: outcome for outcome in outcomes(done)}
    assert list(found) == [stage.name for stage in STAGES]
    ran = {name for name, outcome in found.items() if outcome["status"] != LEFT_OUT}
    everywhere = {"operations", "exactness", "prefix-hits", "preemption"}
    assert ran == everywhere | {"eager-cpu", "host-memory", "positions"}
    assert all(o["reason"] for o in found.values() if o["status"] == LEFT_OUT)
    # what has passed is not repeated, and all is well now
    done = invoke("--limit", "7")
    assert done.exit_code == 0, done.output
    limits = {o["stage"]: o["found"].get("limit") for o in outcomes(done) if o["stage"] in ran}
    assert limits == {name: 7.0 if name == "preemption" else 150.0 for name in ran}


def test_a_run_that_checked_nothing_is_not_well(invoke: Any) -> None:
    done = invoke("--stages", "fp8,compiled")
    assert done.exit_code == 1
    assert "nothing was checked" in done.output


def test_an_unknown_stage_is_refused(invoke: Any) -> None:
    done = invoke("--stages", "graphs")
    assert done.exit_code == 2
    assert "no stage 'graphs'" in done.output


@pytest.mark.slow
def test_the_real_command_on_a_cpu(tmp_path: Path) -> None:
    """Proves the whole way: model, both engines, oracle, verdict; bfloat16 with prefix hits."""
    pytest.importorskip("vllm")
    from vllm_sepllm.processes import run_limited

    # 1: the stage that a CPU leaves out is no failure
    arguments = ["--out", str(tmp_path), "--stages", "prefix-hits,compiled"]
    arguments += ["--limit", "500"]  # the test machine may be busy
    log = tmp_path / "log"
    ended = run_limited(
        [sys.executable, "-m", "vllm_sepllm.bench.gpu_check", *arguments], log, 600.0
    )
    assert ended.code == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    hits, compiled = (json.loads(line) for line in lines)
    assert (hits["status"], compiled["status"]) == (PASSED, LEFT_OUT)
    errors = hits["found"]["errors"]
    assert errors["control"]["mean"] > 4 * errors["sepllm"]["mean"]
    assert hits["found"]["counters"]["cached tokens"] > 0
