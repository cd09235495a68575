"""The command around the shapes: what fits, what is shared, the table, resuming."""

import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from vllm_sepllm.bench import __main__ as bench
from vllm_sepllm.bench.shapes import command, measure
from vllm_sepllm.bench.shapes.cases import Budget, Case, Step
from vllm_sepllm.bench.shapes.measure import Job
from vllm_sepllm.bench.shapes.samples import Measured, append, by_case, read
from vllm_sepllm.bench.shapes.shape import SHAPES
from vllm_sepllm.processes import Ended

SETTING = {"shape": "tiny"}
TTFT = Case("ttft", 256, 1)
JOB = Job("tiny", "folder", [256], ["ttft"], 1, 0.0, None, SETTING)


def measured(number: int, stock: float, sepllm: float) -> Measured:
    samples = [("256 tokens", "stock", "ttft_s", stock), ("256 tokens", "sepllm", "ttft_s", sepllm)]
    return Measured(Step(TTFT, number), 3.0, samples, {"stock": {"backend": "B"}})


def test_two_engines_of_8b_and_128k_fit_80_gb_and_8k_48_gb() -> None:
    lengths = (8192, 32768, 131072)
    for name in command.DEFAULT_SHAPES:
        assert command.lengths_that_fit(SHAPES[name], lengths, 85e9) == [8192, 32768, 131072]
        assert command.lengths_that_fit(SHAPES[name], lengths, 48e9) == [8192]
        assert command.lengths_that_fit(SHAPES[name], lengths, 24e9) == []
        assert command.lengths_that_fit(SHAPES[name], (8192, 8192), None) == [8192]


def test_shapes_share_what_is_left() -> None:
    """The second gets what the first did not need, and a failure takes nothing from it."""
    now, limits = [0.0], []

    def run(job: Job, limit: float) -> bool:
        limits.append((job.seconds, limit))
        now[0] += 100.0
        return len(limits) > 1

    is_well = command.run_all([JOB, JOB], Budget(600.0, lambda: now[0]), run)
    assert limits == [(290.0, 300.0), (490.0, 500.0)]
    assert not is_well


def test_samples_are_read_back_by_setting(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    assert read(file, SETTING) == []
    rounds = [measured(0, 2.0, 1.0), measured(1, 4.0, 1.0)]
    for each in rounds:
        append(file, SETTING, each)
    append(file, {"shape": "other"}, measured(0, 9.0, 9.0))
    with file.open("a") as lines:
        lines.write('{"setting": {"shape": "ti')  # a run that was killed here
    assert read(file, SETTING) == rounds
    (results,) = by_case(rounds).values()
    assert results.samples["256 tokens", "stock", "ttft_s"] == [2.0, 4.0]
    assert results.settings == {"parts": {"stock": {"backend": "B"}}}


def test_the_roofline_stands_beside_the_measure_that_it_bounds() -> None:
    found = by_case([measured(0, 2.0, 1.0)])
    rows = command.rows_of("tiny", found, "h100", 256)
    assert [row["over_stock"] for row in rows] == [1.0, 0.5]
    assert all(0 < row["bound"] < 1e-3 for row in rows)
    assert {row["bound_is"] for row in rows} == {"model, not a measurement"}
    out = StringIO()
    Console(file=out, width=200).print(command.render(rows))
    assert "model, not a measurement" in out.getvalue()
    assert "H100 SXM" in out.getvalue()
    unknown = command.rows_of("tiny", found, None, 256)
    assert [row["bound"] for row in unknown] == [None, None]
    out = StringIO()
    Console(file=out, width=200).print(command.render(unknown))
    assert "no roofline" in out.getvalue()


class FakeSide:
    """Answers at once."""

    def do(self, name: str, **arguments: Any) -> Any:
        if name == "parts":
            return {"backend": "B"}
        count = len(arguments["prompts"])
        assert [len(prompt) for prompt in arguments["prompts"]] == [256] * count
        return {"seconds": 0.5}


def test_steps_are_stored_as_they_are_measured_and_never_twice(tmp_path: Path) -> None:
    job = replace(JOB, folder=str(tmp_path), rounds=2)
    sides: Any = {"stock": FakeSide(), "sepllm": FakeSide()}
    append(tmp_path / "samples.jsonl", SETTING, measured(0, 2.0, 1.0))
    measure.measure(sides, job, Budget(60.0))
    found = read(tmp_path / "samples.jsonl", SETTING)
    assert [each.step for each in found] == [Step(TTFT, 0), Step(TTFT, 1)]
    assert found[1].samples == [
        ("256 tokens", "stock", "ttft_s", 0.5),
        ("256 tokens", "sepllm", "ttft_s", 0.5),
    ]
    assert found[1].parts["stock"] == {"backend": "B"}


def invoke(*arguments: object) -> Result:
    env = {"COLUMNS": "200"}
    return CliRunner().invoke(bench.app, ["shapes", *map(str, arguments)], env=env)


TINY = ("--shape", "tiny", "--length", 256, "--suite", "ttft", "--rounds", 2, "--gpu", "h100")


@pytest.mark.parametrize("code", [0, 3, None])
def test_samples_of_a_process_that_ended_any_way_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Ends with 1 if it failed, not if its time was over."""
    calls = []

    def run_limited(words: list[str], log: Path, limit: float) -> Ended:
        job = Job(**json.loads(words[-1]))
        calls.append(job)
        assert job.seconds < limit <= 600
        log.write_text("left out: ttft, round 9: needs about 5 s\nnoise\n")
        for number in range(2 if code == 0 else 1):
            append(Path(job.folder) / "samples.jsonl", job.setting, measured(number, 2.0, 1.0))
        return Ended(1.0, code)

    monkeypatch.setattr(command, "run_limited", run_limited)
    done = invoke("--out", tmp_path, *TINY)
    assert done.exit_code == (1 if code else 0), done.output
    assert "left out: ttft, round 9: needs about 5 s" in done.output
    assert ("start again to go on" in done.output) is (code is None)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["side"], row["p50"]) for row in rows] == [("stock", 2.0), ("sepllm", 1.0)]
    assert {"versions", "device", "bound_of"} <= rows[0].keys()
    # what is complete is not measured again
    again = invoke("--out", tmp_path, *TINY)
    assert len(calls) == (1 if code == 0 else 2)
    assert ("measured before" in again.output) is (code == 0)


def test_nothing_measured_is_not_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_limited(_words: list[str], log: Path, _limit: float) -> Ended:
        log.write_text("")
        return Ended(1.0, None)

    monkeypatch.setattr(command, "run_limited", run_limited)
    assert invoke("--out", tmp_path, *TINY).exit_code == 1


def test_mistakes_are_found_before_an_engine_starts(tmp_path: Path) -> None:
    for given, said in (
        (("--shape", "gpt"), "--shape: no 'gpt'; there are llama-3-8b, qwen3-8b, tiny"),
        (("--suite", "prefix"), "--suite: no 'prefix'; there are ttft, decode, concurrency"),
        (("--gpu", "t4"), "--gpu: no 't4'"),
    ):
        done = invoke("--out", tmp_path, *given)
        assert done.exit_code == 2
        assert said in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_the_real_command_on_a_cpu(tmp_path: Path) -> None:
    """Proves the whole way with a shape that is no model's: all suites, both engines at once."""
    pytest.importorskip("vllm")
    from vllm_sepllm.processes import run_limited

    # longer than the window
    arguments = ["--out", str(tmp_path), "--shape", "tiny", "--length", "1024", "--rounds", "1"]
    words = [sys.executable, "-m", "vllm_sepllm.bench", "shapes", *arguments]
    log = tmp_path / "log"
    ended = run_limited(words, log, 600.0)
    assert ended.code == 0, log.read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["suite"] for row in rows} == {"ttft", "decode", "concurrency"}
    sides = {(row["suite"], row["side"]) for row in rows}
    assert sides >= {("decode", "stock at the compact length"), ("concurrency", "sepllm")}
    parts = rows[0]["settings"]["parts"]
    assert parts["sepllm"]["backend"].startswith("SepLLM")
    assert not parts["stock"]["backend"].startswith("SepLLM")
