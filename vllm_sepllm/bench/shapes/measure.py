"""One shape in a process of its own: ``python -m vllm_sepllm.bench.shapes.measure JOB``.

JOB is a :class:`Job` as JSON. Both engines live at once and take turns; every step is stored as
soon as it is measured. Prefix caching is on, as ``vllm serve`` has it, and prompts are new.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_sepllm.bench.gpus import GPUS
from vllm_sepllm.bench.results import Results
from vllm_sepllm.bench.roofline import POLICY
from vllm_sepllm.bench.shapes.cases import (
    MAX_TOKENS,
    Budget,
    Case,
    Step,
    cases_of,
    expected_seconds,
    run_within,
    steps_of,
)
from vllm_sepllm.bench.shapes.samples import Measured, append, read
from vllm_sepllm.bench.shapes.shape import KV_SLACK, SEPARATORS, SHAPES, text
from vllm_sepllm.bench.sides import SideProcess, running
from vllm_sepllm.bench.suites import SUITES, Work, gate

SIDES = ["stock", "sepllm"]


@dataclass(frozen=True, slots=True)
class Job:
    """What the process is told.

    Attributes:
        shape: its name.
        folder: of config, logs and samples.
        lengths: prompt tokens.
        suites: names.
        rounds: of each case at most.
        seconds: budget, start of the engines included.
        gpu: name in GPUS whose figures guess at times; None: no guess.
        setting: stored with every step.
    """

    shape: str
    folder: str
    lengths: list[int]
    suites: list[str]
    rounds: int
    seconds: float
    gpu: str | None
    setting: dict[str, Any]


def arguments_of(job: Job) -> dict[str, Any]:
    """Of vllm.LLM, all sides alike."""
    longest, is_gpu = max(job.lengths), torch.cuda.is_available()
    given: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": longest + MAX_TOKENS,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": SHAPES[job.shape].kv_bytes(longest),
        "enable_prefix_caching": True,
        "enforce_eager": not is_gpu,
    }
    # of memory that must be free at the start, where two engines share a GPU
    return given | ({"gpu_memory_utilization": 0.3} if is_gpu else {})


def work_of(case: Case, vocab_size: int, number: int, longest: int) -> Work:
    """Requests of a step; decoding repeats its prompts, the others are new in every round."""
    seed = 0 if case.suite == "decode" else 1 + number
    return Work(
        text=text(vocab_size, longest, seed * 1000 + case.length % 997),
        lengths=[case.length],
        batches=[case.batch],
        max_tokens=MAX_TOKENS,
        rounds=1,
        kv_tokens=longest + KV_SLACK,
    )


def measure(sides: dict[str, SideProcess], job: Job, budget: Budget) -> None:
    """Every step that there is time for."""
    sizes, longest = SHAPES[job.shape].sizes, max(job.lengths)
    file = Path(job.folder) / "samples.jsonl"
    parts = {name: side.do("parts") for name, side in sides.items()}
    gpu = None if job.gpu is None else GPUS[job.gpu]

    def run(step: Step) -> float:
        start, results = time.monotonic(), Results(step.case.suite, {})
        work = work_of(step.case, sizes.vocab_size, step.round, longest)
        SUITES[step.case.suite].run(sides, work, results)
        seconds = time.monotonic() - start
        samples = [(*key, values[0]) for key, values in results.samples.items()]
        append(file, job.setting, Measured(step, seconds, samples, parts))
        return seconds

    left_out = run_within(
        steps_of(cases_of(job.lengths, job.suites), job.rounds),
        {found.step: found.seconds for found in read(file, job.setting)},
        lambda case: expected_seconds(case, sizes, gpu, longest),
        budget,
        run,
    )
    for step, reason in left_out:
        said = f"left out: {step.case}, round {step.round + 1}: {reason}"
        Console(stderr=True).print(said, highlight=False)


def main() -> None:
    """Start the engines, let them answer alike, measure."""
    job = Job(**json.loads(sys.argv[1]))
    budget = Budget(job.seconds)
    folder, shape = Path(job.folder), SHAPES[job.shape]
    longest = max(job.lengths)
    model = shape.write(folder / "model", longest)
    policy = {"separators": list(SEPARATORS), "max_separators": POLICY.max_separators}
    own = {"sepllm": {"additional_config": {"sepllm": policy}}}
    with running(SIDES, str(model), arguments_of(job), folder, own) as sides:
        gate(sides, work_of(Case("ttft", longest, 1), shape.sizes.vocab_size, 0, longest))
        measure(sides, job, budget)


if __name__ == "__main__":
    main()
