"""Results of a benchmark: JSON lines with units in the keys, and where they were measured."""

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """Versions and hardware, a part of every line."""
    versions = {}
    for name in ("vllm-sepllm", "vllm", "torch", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    return {"versions": versions, "device": device, "threads": int(threads)}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def spread(values: list[float]) -> dict[str, float]:
    """p20, median and p80; a lone value is all three."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cut = quantiles(values, n=10, method="inclusive")
    return {"p20": cut[1], "p50": cut[4], "p80": cut[7]}


@dataclass(slots=True)
class Results:
    """Samples by (case, side, measure), taken in turn.

    Attributes:
        suite: what is measured.
        settings: what all samples have in common.
        samples: the values; the measure's name ends in its unit.
    """

    suite: str
    settings: dict[str, Any]
    samples: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)

    def add(self, case: str, side: str, **measures: float) -> None:
        """Remember one sample of each measure, and say so: a suite takes minutes."""
        found = ", ".join(f"{measure} {value:.4g}" for measure, value in measures.items())
        Console(stderr=True).print(f"{self.suite}, {case}, {side}: {found}", highlight=False)
        for measure, value in measures.items():
            self.samples.setdefault((case, side, measure), []).append(value)

    def ratio(self, case: str, side: str, measure: str) -> float | None:
        """Median over the median of stock vLLM in the same run; None without one."""
        stock = self.samples.get((case, "stock", measure))
        if stock is None:
            return None
        base = spread(stock)["p50"]
        return spread(self.samples[case, side, measure])["p50"] / base if base else None

    def rows(self) -> list[dict[str, Any]]:
        """One row a (case, side, measure)."""
        return [
            {"suite": self.suite, "case": case, "side": side, "measure": measure}
            | {key: round(value, 6) for key, value in spread(values).items()}
            | {"num_samples": len(values), "over_stock": self.ratio(case, side, measure)}
            for (case, side, measure), values in self.samples.items()
        ]

    def write(self, file: TextIO) -> None:
        """Append the rows as JSON lines, each with settings, versions and hardware."""
        where = machine()
        for row in self.rows():
            print(json.dumps(row | {"settings": self.settings} | where), file=file, flush=True)


def render(rows: list[dict[str, Any]]) -> Table:
    """The table for a terminal."""
    table = Table(title="Medians of one run; the last column is over stock vLLM in that run")
    for column in ("suite", "case", "side", "measure"):
        table.add_column(column)
    for column in ("median", "p20", "p80", "samples", "over stock"):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = row["over_stock"]
        table.add_row(
            *(row[key] for key in ("suite", "case", "side", "measure")),
            *(f"{row[key]:.4g}" for key in ("p50", "p20", "p80")),
            str(row["num_samples"]),
            "-" if ratio is None else f"{ratio:.3f}",
        )
    return table
