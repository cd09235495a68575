"""Outcomes of stages: what is stored, found again and printed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "failed", "timed out", "left out"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended.

    Attributes:
        stage: its name.
        status: PASSED, FAILED, TIMED_OUT or LEFT_OUT.
        reason: why it did not pass.
        seconds: that it took.
        log: file with what it wrote.
        found: what it measured.
        setting: what it ran with; an outcome counts for a later run with the same alone.
    """

    stage: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    log: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def is_bad(self) -> bool:
        """Whether the command must end with 1."""
        return self.status in (FAILED, TIMED_OUT)


def append(file: Path, outcome: Outcome) -> None:
    """Store one outcome as a JSON line."""
    with file.open("a") as lines:
        print(json.dumps(asdict(outcome)), file=lines, flush=True)


def passed_before(file: Path, setting: dict[str, Any]) -> dict[str, Outcome]:
    """Stages that passed with the same setting, by name; a line that broke off is none."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if outcome.status == PASSED and outcome.setting == setting:
            found[outcome.stage] = outcome
    return found


def _parts(outcome: Outcome) -> str:
    parts = outcome.found.get("parts", {})
    return ", ".join(str(parts[name]) for name in ("backend", "runner", "graphs") if name in parts)


def _error(outcome: Outcome, side: str) -> str:
    errors = outcome.found.get("errors", {}).get(side)
    return f"{errors['mean']:.2g} / {errors['largest']:.2g}" if errors else "-"


def render(outcomes: list[Outcome]) -> Table:
    """The table for a terminal."""
    table = Table(
        title="Stages; errors are those of log-probabilities against float32, mean / largest"
    )
    for column in ("stage", "status"):
        table.add_column(column)
    for column in ("s", "stock", "sepllm", "sepllm against full attention"):
        table.add_column(column, justify="right")
    table.add_column("what ran, or why not", overflow="fold")
    for outcome in outcomes:
        errors = (_error(outcome, side) for side in ("stock", "sepllm", "control"))
        seconds = f"{outcome.seconds:.0f}" if outcome.seconds else "-"
        said = outcome.reason or _parts(outcome)
        table.add_row(outcome.stage, outcome.status, seconds, *errors, said)
    return table
