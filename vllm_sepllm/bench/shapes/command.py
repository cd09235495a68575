"""``python -m vllm_sepllm.bench shapes``: all shapes within one time budget, then a table."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_sepllm.bench.gpus import DEVICES, GPUS
from vllm_sepllm.bench.results import Results, machine
from vllm_sepllm.bench.roofline import LABEL
from vllm_sepllm.bench.shapes.cases import Budget, Case, cases_of, predicted, steps_of
from vllm_sepllm.bench.shapes.measure import Job
from vllm_sepllm.bench.shapes.samples import by_case, read
from vllm_sepllm.bench.shapes.shape import SHAPES, USABLE, Shape
from vllm_sepllm.processes import run_limited, tail

DEFAULT_SHAPES = ("llama-3-8b", "qwen3-8b")
LENGTHS = (8192, 32768, 131072)
TIMED = ("ttft", "decode", "concurrency")
STOP_SECONDS = 10.0  # kept back for engines to end and for the table
# the measure of each suite that the cost model bounds
MAIN = {
    "ttft": "ttft_s",
    "decode": "time_per_token_s",
    "concurrency": "output_tokens_per_s",
}


def lengths_that_fit(shape: Shape, lengths: Iterable[int], memory: float | None) -> list[int]:
    """Those for which both engines fit the GPU's memory; None: of a CPU, taken as they are."""
    ordered = sorted(set(lengths))
    while memory is not None and ordered and shape.memory(ordered[-1]) > USABLE * memory:
        ordered.pop()
    return ordered


def rows_of(
    shape: str, found: dict[Case, Results], gpu: str | None, longest: int
) -> list[dict[str, Any]]:
    """A row a (case, side, measure), the bound beside those measures that have one."""
    rows = []
    for case, results in found.items():
        for row in results.rows():
            bound = None
            if gpu is not None and row["measure"] == MAIN[case.suite]:
                sizes = SHAPES[shape].sizes
                bound = predicted(case, row["side"], sizes, GPUS[gpu], longest)
            known = {"bound": bound, "bound_is": LABEL, "bound_of": gpu}
            rows.append({"shape": shape} | row | known | {"settings": results.settings})
    return rows


def render(rows: list[dict[str, Any]]) -> Table:
    """The table for a terminal."""
    table = Table(title=f"Medians of one run; 'roofline' is a {LABEL}", caption=_caption(rows))
    for column in ("shape", "case", "side", "measure"):
        table.add_column(column)
    for column in ("median", "samples", "over stock", "roofline", "median / roofline"):
        table.add_column(column, justify="right")
    for row in rows:
        ratio, bound = row["over_stock"], row["bound"]
        table.add_row(
            row["shape"],
            f"{row['suite']}, {row['case']}",
            row["side"],
            row["measure"],
            f"{row['p50']:.4g}",
            str(row["num_samples"]),
            "-" if ratio is None else f"{ratio:.3f}",
            "-" if bound is None else f"{bound:.4g}",
            "-" if bound is None else f"{row['p50'] / bound:.2f}",
        )
    return table


def _caption(rows: list[dict[str, Any]]) -> str:
    if all(row["bound"] is None for row in rows):
        return "no roofline: the device's figures are not known; give --gpu"
    return f"roofline of {GPUS[rows[0]['bound_of']].name}, peak figures"


def checked(option: str, given: list[str] | None, known: Iterable[str]) -> list[str]:
    """Names that were given, all of those known if none was."""
    names = list(known)
    for name in given or ():
        if name not in names:
            raise typer.BadParameter(f"{option}: no {name!r}; there are {', '.join(names)}")
    return list(given or names)


def run_all(jobs: list[Job], budget: Budget, run: Callable[[Job, float], bool]) -> bool:
    """Run the jobs in turn, each with an equal part of what is left; whether all went well.

    Args:
        jobs: whose ``seconds`` are set here.
        budget: of all together.
        run: takes a job and the seconds after which it is ended.
    """
    is_well = True
    for number, job in enumerate(jobs):
        share = budget.left() / (len(jobs) - number)
        is_well &= run(replace(job, seconds=max(0.0, share - STOP_SECONDS)), share)
    return is_well


def shapes(
    out: Annotated[Path, typer.Option(help="Folder of samples, logs and results.")],
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}. Default: the 8B ones.")
    ] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Of " + ", ".join(TIMED) + ".")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each case, if there is time.")] = 3,
    seconds: Annotated[float, typer.Option(help="For everything together.")] = 600.0,
    gpu: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(GPUS)}. Default: as the driver says.")
    ] = None,
) -> None:
    """Time stock vLLM and sepllm at shapes of real models, with weights that are made up.

    The roofline's bound stands beside each figure. The same command with the same folder goes on
    where the time was over. Ends with 1 if engines failed or nothing was measured.
    """
    names = checked("--shape", shape or list(DEFAULT_SHAPES), SHAPES)
    suites = checked("--suite", suite, TIMED)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    folder, budget = out.resolve(), Budget(seconds)
    where = machine()
    board = DEVICES.get(where["device"]) if gpu is None else checked("--gpu", [gpu], GPUS)[0]
    memory = None
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    jobs = []
    for name in names:
        lengths = lengths_that_fit(SHAPES[name], length or LENGTHS, memory)
        for other in sorted(set(length or LENGTHS) - set(lengths)):
            console.print(f"{name}: {other} tokens left out: two engines need more memory")
        if lengths:
            setting = {"shape": name, "longest": lengths[-1]} | where
            own = str(folder / name)
            jobs.append(Job(name, own, lengths, suites, rounds, 0.0, board, setting))

    def run(job: Job, limit: float) -> bool:
        own = Path(job.folder)
        own.mkdir(parents=True, exist_ok=True)
        done = {found.step for found in read(own / "samples.jsonl", job.setting)}
        if done.issuperset(steps_of(cases_of(job.lengths, suites), rounds)):
            console.print(f"{job.shape}: measured before")
            return True
        log = own / "measure.log"
        console.print(f"{job.shape}: at most {limit:.0f} s, log {log}")
        command = [sys.executable, "-m", "vllm_sepllm.bench.shapes.measure"]
        ended = run_limited([*command, json.dumps(asdict(job))], log, limit)
        said = [line for line in log.read_text().splitlines() if line.startswith("left out: ")]
        for line in said:
            console.print(f"{job.shape}: {line}")
        if ended.code is None:
            console.print(f"{job.shape}: ended after {limit:.0f} s; start again to go on")
        elif ended.code:
            console.print(tail(log))
        return not ended.code

    start = time.monotonic()
    is_well = run_all(jobs, budget, run)
    rows = []
    for job in jobs:
        found = by_case(read(Path(job.folder) / "samples.jsonl", job.setting))
        rows += rows_of(job.shape, found, board, job.lengths[-1])
    if rows:
        Console(width=None if sys.stdout.isatty() else 150).print(render(rows))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("w") as file:
        for row in rows:
            print(json.dumps(row | where), file=file)
    console.print(f"{time.monotonic() - start:.0f} s; {folder / 'results.jsonl'}")
    raise typer.Exit(int(not is_well or not rows))
