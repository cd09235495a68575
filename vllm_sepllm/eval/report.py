"""Rows from finished cells: JSON for programs, Markdown for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sepllm.eval.methods import FULL
from vllm_sepllm.eval.needle import Needle
from vllm_sepllm.eval.statistics import Estimate, block_bootstrap, exponential, wilson
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.suite import Group
from vllm_sepllm.eval.text import Excerpt, cell_key

# tokens that stay together when the intervals are drawn
_BLOCK = 64
# of eval/tasks.py, which needs lm_eval to be imported
_TASK = "task"


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one length.

    Attributes:
        items: names of what was measured.
        kept: mean keys per scored query and layer; ``share`` of full attention's.
        values: what was measured.
        by_depth: needles alone: depth -> (found, asked).
    """

    suite: str
    length: int
    items: str
    method: str
    settings: dict[str, Any] | None
    kept: float
    share: float
    values: dict[str, Estimate]
    by_depth: dict[str, tuple[int, int]]


def rows(groups: Sequence[Group], store: Store) -> list[Row]:
    """The report's rows; every cell must be finished."""
    found = []
    for group in groups:
        settings = None if group.method.settings is None else dict(group.method.settings)
        values, by_depth = _MEASURES[group.suite](group, store)
        share = group.kept / group.kept_by_full
        name = group.method.name
        items = ", ".join(cell.item.name for cell in group.cells)
        found.append(
            Row(
                group.suite,
                group.length,
                items,
                name,
                settings,
                group.kept,
                share,
                values,
                by_depth,
            )
        )
    return found


def _text(group: Group, store: Store) -> tuple[dict[str, Estimate], dict[str, tuple[int, int]]]:
    own = _cells(group, group.method.name, store)
    values = {"perplexity": exponential(block_bootstrap([c["nll"] for c in own], _BLOCK))}
    values |= _ratios(group, store, _BLOCK)
    if group.method.name == FULL:
        return values, {}
    values["kl"] = block_bootstrap([o["kl"] for o in own], _num_near(group))
    full = _cells(group, FULL, store)
    agreed = [np.equal(o["top_ids"], f["top_ids"]) for o, f in zip(own, full, strict=True)]
    values["top1"] = block_bootstrap(agreed, _BLOCK)
    return values, {}


def _num_near(group: Group) -> int:
    """How many compared positions of an excerpt lie in one block of its tokens."""
    excerpt = group.cells[0].item
    assert isinstance(excerpt, Excerpt), "the suite has no other items"
    first = excerpt.positions[0]
    return sum(position < first + _BLOCK for position in excerpt.positions)


def _cells(group: Group, method: str, store: Store) -> list[dict[str, Any]]:
    return [store.read(cell_key(cell.item, method)) for cell in group.cells]


def _ratios(group: Group, store: Store, block: int) -> dict[str, Estimate]:
    """Perplexity over that of full attention, and of the StreamingLLM of the same mean KV.

    Paired: the difficulty of the texts cancels.
    """
    name, rival = group.method.name, group.method.rival
    found = {}
    for measure, other in (("ratio", FULL), ("beside", rival)):
        if other not in (None, name) and name != FULL:
            pairs = zip(_cells(group, name, store), _cells(group, other, store), strict=True)
            apart = [np.subtract(o["nll"], f["nll"]) for o, f in pairs]
            found[measure] = exponential(block_bootstrap(apart, block))
    return found


def _needle(group: Group, store: Store) -> tuple[dict[str, Estimate], dict[str, tuple[int, int]]]:
    cells = [store.read(cell.key) for cell in group.cells]
    found = sum(cell["is_found"] for cell in cells)
    by_depth = {}
    for depth in sorted({cell["depth"] for cell in cells}):
        there = [cell["is_found"] for cell in cells if cell["depth"] == depth]
        by_depth[f"{depth:g}"] = (sum(there), len(there))
    return {"found": wilson(found, len(cells))}, by_depth


def _task(group: Group, store: Store) -> tuple[dict[str, Estimate], dict[str, tuple[int, int]]]:
    cells = [store.read(cell.key) for cell in group.cells]
    right = [flag for cell in cells for flag in cell["is_right"]]
    values = {"right": wilson(sum(right), len(right))}
    if "nll" in cells[0]:
        # a question depends on no other
        values["perplexity"] = exponential(block_bootstrap([c["nll"] for c in cells], 1))
        values |= _ratios(group, store, 1)
    return values, {}


_MEASURES = {Excerpt.suite: _text, Needle.suite: _needle, _TASK: _task}


def write(folder: Path, found: Sequence[Row], run: dict[str, Any]) -> None:
    """``results.json`` and ``report.md``."""
    document = {"run": run, "rows": [asdict(row) for row in found]}
    (folder / "results.json").write_text(json.dumps(document, indent=1), "utf-8")
    (folder / "report.md").write_text(markdown(found), "utf-8")


def markdown(found: Sequence[Row]) -> str:
    """Tables of all suites; intervals are 95 %."""
    parts = []
    text = [row for row in found if row.suite == Excerpt.suite]
    if text:
        head = "| context | method | mean KV | of full | perplexity | ratio to full |"
        lines = [f"{head} to streaming-llm | KL | top-1 |"]
        lines += ["| --- | --- | ---: | ---: | --- | --- | --- | --- | --- |"]
        lines += [_text_line(row) for row in text]
        parts.append("\n".join(lines))
    needle = [row for row in found if row.suite == Needle.suite]
    if needle:
        depths = list(needle[0].by_depth)
        names = " | ".join(f"depth {depth}" for depth in depths)
        head = f"| context | method | KV at the question | of full | found | {names} |"
        lines = [head, "| --- | --- | ---: | ---: | --- |" + " --- |" * len(depths)]
        lines += [_needle_line(row) for row in needle]
        parts.append("\n".join(lines))
    tasks = [row for row in found if row.suite == _TASK]
    if tasks:
        head = "| task | method | KV at the answer | of full | right | answer's perplexity |"
        lines = [f"{head} ratio to full | to streaming-llm |"]
        lines += ["| --- | --- | ---: | ---: | --- | --- | --- | --- |", *map(_task_line, tasks)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _start(row: Row) -> str:
    return f"| {row.length:,} | {row.method} | {row.kept:,.0f} | {row.share:.0%} |"


def _text_line(row: Row) -> str:
    return f"{_start(row)} {_perplexities(row)} | {_share(row, 'kl')} | {_share(row, 'top1')} |"


def _perplexities(row: Row) -> str:
    perplexity = _interval(row.values["perplexity"], "{:.2f}")
    return f"{perplexity} | {_share(row, 'ratio')} | {_share(row, 'beside')}"


def _share(row: Row, measure: str) -> str:
    """Empty where a method would be compared with itself, or has nothing to be compared with."""
    return _interval(row.values[measure], "{:.3f}") if measure in row.values else ""


def _needle_line(row: Row) -> str:
    share = _interval(row.values["found"], "{:.0%}")
    counts = " | ".join(f"{found}/{asked}" for found, asked in row.by_depth.values())
    return f"{_start(row)} {share} | {counts} |"


def _task_line(row: Row) -> str:
    start = f"| {row.items} | {row.method} | {row.kept:,.0f} | {row.share:.0%} |"
    right = _interval(row.values["right"], "{:.0%}")
    scored = _perplexities(row) if "perplexity" in row.values else " |  | "
    return f"{start} {right} | {scored} |"


def _interval(value: Estimate, form: str) -> str:
    if value.low is None or value.high is None:
        return form.format(value.mean)
    mean, low, high = (form.format(x) for x in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"
