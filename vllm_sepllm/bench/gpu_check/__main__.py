"""Check vLLM with sepllm on this machine: ``python -m vllm_sepllm.bench.gpu_check --out FOLDER``.

Every stage is a process with a log and a time limit of its own. Stock vLLM runs first in each: how
far it is from a float32 oracle says how far sepllm may be from its own. Needs no model and no
network. A run that is started again with the same folder goes on behind what has passed.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_sepllm.bench.gpu_check.model import check_model, write_model
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
from vllm_sepllm.bench.gpu_check.stage import Job
from vllm_sepllm.bench.gpu_check.stages import STAGES, Machine, Stage, left_out, this_machine
from vllm_sepllm.bench.results import machine
from vllm_sepllm.processes import run_limited, tail

Run = Callable[[Stage], Outcome]


def chosen_stages(names: str | None) -> list[Stage]:
    """Stages by their names, parted by commas; all of them if none is given."""
    if names is None:
        return list(STAGES)
    known = {stage.name: stage for stage in STAGES}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise typer.BadParameter(f"--stages: no stage {name!r}; there are {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in wanted]


def run_stage(
    stage: Stage, command: Sequence[str], folder: Path, limit: float, setting: dict[str, Any]
) -> Outcome:
    """Run the stage's process; ``command`` writes what it found to STAGE.json in ``folder``."""
    result, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    result.unlink(missing_ok=True)
    ended = run_limited(command, log, limit)
    found = json.loads(result.read_text()) if ended.code == 0 and result.exists() else {}
    status, reason = PASSED, ""
    if ended.code is None:
        status, reason = TIMED_OUT, f"ended after {limit:.0f} s, see {log}"
    elif not found:
        last = tail(log, 1).splitlines()[1:]
        status, reason = FAILED, f"exit status {ended.code}: {' '.join(last)}, see {log}"
    elif found["faults"]:
        status, reason = FAILED, "; ".join(found["faults"])
    return Outcome(stage.name, status, reason, round(ended.seconds, 1), str(log), found, setting)


def outcomes_of(
    stages: Sequence[Stage], where: Machine, before: dict[str, Outcome], run: Run
) -> Iterator[Outcome]:
    """Run the stages in their order, but for those left out and those that have passed."""
    for stage in stages:
        reason = left_out(stage, where)
        if reason is not None:
            yield Outcome(stage.name, LEFT_OUT, reason)
        elif stage.name in before:
            yield before[stage.name]
        else:
            yield run(stage)


def main(
    out: Annotated[Path, typer.Option(help="Folder of logs and results.")],
    model: Annotated[
        Path | None, typer.Option(help="A model's folder. Default: random weights, written there.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help=f"Of {','.join(s.name for s in STAGES)}. Default: all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model where a stage has none.")] = "bfloat16",
    limit: Annotated[
        float | None, typer.Option(help="Seconds of a stage. Default: each stage's own.")
    ] = None,
) -> None:
    """Run the stages, print a table and a JSON line a stage; end with 1 unless all is well.

    A stage that makes no sense on this machine is left out with the reason. A run in which nothing
    was checked is not well.
    """
    chosen, where, folder = chosen_stages(stages), this_machine(), out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = write_model(folder / "model") if model is None else model.resolve()
    try:
        check_model(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--model: {error}") from None
    setting = {"model": str(path), "dtype": dtype} | machine()
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    results = folder / "results.jsonl"

    def run(stage: Stage) -> Outcome:
        seconds = stage.limit if limit is None else limit
        console.print(f"{stage.name}: {stage.what}; at most {seconds:.0f} s")
        result = folder / f"{stage.name}.json"
        job = json.dumps(asdict(Job(stage.name, str(path), dtype, str(result))))
        command = [sys.executable, "-m", "vllm_sepllm.bench.gpu_check.stage", job]
        outcome = run_stage(stage, command, folder, seconds, setting)
        append(results, outcome)
        console.print(f"{stage.name}: {outcome.status} {outcome.reason}")
        return outcome

    before = passed_before(results, setting)
    found = list(outcomes_of(chosen, where, before, run))
    Console(width=None if sys.stdout.isatty() else 150).print(render(found))
    for outcome in found:
        print(json.dumps(asdict(outcome)))
    is_checked = any(outcome.status != LEFT_OUT for outcome in found)
    if not is_checked:
        console.print("nothing was checked: every stage was left out")
    raise typer.Exit(int(not is_checked or any(outcome.is_bad for outcome in found)))


if __name__ == "__main__":
    typer.run(main)
