"""Samples on disk, one JSON line a step, so that a run that is started again goes on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sepllm.bench.results import Results
from vllm_sepllm.bench.shapes.cases import Case, Step

Sample = tuple[str, str, str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step gave.

    Attributes:
        step: case and round.
        seconds: that it took.
        samples: (case, side, measure, value).
        parts: side -> what its engine is made of.
    """

    step: Step
    seconds: float
    samples: list[Sample]
    parts: dict[str, dict[str, str]]


def append(file: Path, setting: dict[str, Any], measured: Measured) -> None:
    """Store a step."""
    with file.open("a") as lines:
        print(json.dumps({"setting": setting} | asdict(measured)), file=lines, flush=True)


def read(file: Path, setting: dict[str, Any]) -> list[Measured]:
    """Steps that ran with the setting; a line that broke off is none."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            stored = json.loads(line)
        except ValueError:
            continue
        if stored.pop("setting") == setting:
            step = Step(Case(**stored["step"]["case"]), stored["step"]["round"])
            samples = [tuple(sample) for sample in stored["samples"]]
            found.append(Measured(step, stored["seconds"], samples, stored["parts"]))
    return found


def by_case(measured: list[Measured]) -> dict[Case, Results]:
    """Samples of all rounds of a case together."""
    found: dict[Case, Results] = {}
    for each in measured:
        case = each.step.case
        results = found.setdefault(case, Results(case.suite, {"parts": each.parts}))
        for name, side, measure, value in each.samples:
            results.samples.setdefault((name, side, measure), []).append(value)
    return found
