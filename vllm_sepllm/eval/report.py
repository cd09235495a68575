"""Results from stored answers: JSON for programs, Markdown for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sepllm.eval.methods import FULL, ModelFacts, mean_kept
from vllm_sepllm.eval.needle import Needles
from vllm_sepllm.eval.questions import Generated, Scored
from vllm_sepllm.eval.run import Row
from vllm_sepllm.eval.statistics import Estimate, block_bootstrap, exponential, wilson
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.text import Excerpt, Texts

# tokens that stay together when the intervals are drawn
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Result:
    """A method in a task, over the items that all methods have answered.

    Attributes:
        kind: of the task; a table each.
        task: its name.
        length: context of the task.
        num_items: that were answered by all methods, of ``num_asked``.
        method: its name.
        settings: of the method; None is full attention.
        kept: mean keys per counted query and layer; ``share`` of full attention's.
        values: what was measured, by measure.
        counts: of needles depth -> (found, asked); of questions way of reading the answer ->
            (right here alone, right with full attention alone).
    """

    kind: str
    task: str
    length: int
    num_items: int
    num_asked: int
    method: str
    settings: dict[str, Any] | None
    kept: float
    share: float
    values: dict[str, Estimate]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Answers:
    """Answers to the same items, of a method and of what it is compared with.

    Attributes:
        full: of full attention; None for full attention itself.
        rival: of the StreamingLLM of the same mean KV; None for itself, and where there is none.
    """

    items: list[Any]
    own: list[dict[str, Any]]
    full: list[dict[str, Any]] | None
    rival: list[dict[str, Any]] | None


def results(rows: Sequence[Row], store: Store, facts: ModelFacts) -> list[Result]:
    """Results of the items that all methods have answered; tasks without such are left out."""
    found = []
    for row in rows:
        methods = [other for other in rows if other.task is row.task]
        answers = {other.method.name: store.answers(other.key) for other in methods}
        common = [i for i in row.task.asked if all(i.name in own for own in answers.values())]
        if not common:
            continue
        by_method = {name: [own[i.name] for i in common] for name, own in answers.items()}
        name, settings = row.method.name, row.method.settings
        full, rival = (
            None if other in (None, name) else by_method[other] for other in (FULL, row.rival)
        )
        values, counts = _MEASURES[row.task.kind](
            _Answers(common, by_method[name], full, rival if name != FULL else None)
        )
        spans = row.task.spans(common, by_method[name])
        kept = mean_kept(settings, spans, facts)
        found.append(
            Result(
                kind=row.task.kind,
                task=row.task.name,
                length=row.task.length,
                num_items=len(common),
                num_asked=len(row.task.asked),
                method=name,
                settings=None if settings is None else dict(settings),
                kept=kept,
                share=kept / mean_kept(None, spans, facts),
                values=values,
                counts=counts,
            )
        )
    return found


_Measured = tuple[dict[str, Estimate], dict[str, tuple[int, int]]]


def _text(answers: _Answers) -> _Measured:
    own = answers.own
    values = {"perplexity": exponential(block_bootstrap([a["nll"] for a in own], _BLOCK))}
    nll = {"ratio": answers.full, "beside": answers.rival}
    for measure, others in nll.items():
        if others is not None:
            # paired: the difficulty of the texts cancels
            apart = [np.subtract(a["nll"], o["nll"]) for a, o in zip(own, others, strict=True)]
            values[measure] = exponential(block_bootstrap(apart, _BLOCK))
    if answers.full is not None:
        values["kl"] = block_bootstrap([a["kl"] for a in own], _num_near(answers.items[0]))
        pairs = zip(own, answers.full, strict=True)
        agreed = [np.equal(a["top_ids"], f["top_ids"]) for a, f in pairs]
        values["top1"] = block_bootstrap(agreed, _BLOCK)
    return values, {}


def _num_near(excerpt: Excerpt) -> int:
    """How many compared positions of an excerpt lie in one block of its tokens."""
    first = excerpt.positions[0]
    return sum(position < first + _BLOCK for position in excerpt.positions)


def _needle(answers: _Answers) -> _Measured:
    found = [answer["is_found"] for answer in answers.own]
    counts = {}
    for depth in sorted({answer["depth"] for answer in answers.own}):
        there = [answer["is_found"] for answer in answers.own if answer["depth"] == depth]
        counts[f"{depth:g}"] = (sum(there), len(there))
    return {"found": wilson(sum(found), len(found))}, counts


def _scored(answers: _Answers) -> _Measured:
    own = np.array([answer["nll"] for answer in answers.own])
    values, counts = _generated(answers)
    # a question depends on no other
    values["perplexity"] = exponential(block_bootstrap([own], 1))
    for measure, others in {"ratio": answers.full, "beside": answers.rival}.items():
        if others is not None:
            apart = own - [other["nll"] for other in others]
            values[measure] = exponential(block_bootstrap([apart], 1))
    return values, counts


def _generated(answers: _Answers) -> _Measured:
    """Shares of right answers, and paired differences to full attention and the rival."""
    values: dict[str, Estimate] = {}
    counts: dict[str, tuple[int, int]] = {}
    for grade in answers.own[0]["right"]:
        own = _right(answers.own, grade)
        values[f"right {grade}"] = wilson(int(own.sum()), len(own))
        for measure, others in {"full": answers.full, "rival": answers.rival}.items():
            if others is not None:
                other = _right(others, grade)
                values[f"{measure} {grade}"] = block_bootstrap([own - other], 1)
        if answers.full is not None:
            full = _right(answers.full, grade)
            counts[grade] = (int((own > full).sum()), int((own < full).sum()))
    return values, counts


def _right(answers: Sequence[dict[str, Any]], grade: str) -> Any:
    return np.array([answer["right"][grade] for answer in answers], dtype=np.int64)


_MEASURES = {
    Texts.kind: _text,
    Needles.kind: _needle,
    Scored.kind: _scored,
    Generated.kind: _generated,
}


def write(folder: Path, found: Sequence[Result], run: dict[str, Any]) -> None:
    """``results.json`` and ``report.md``; of a model's folder they tell others the name alone."""
    shown = dict(run)
    if Path(shown.get("model", "")).is_absolute():
        shown["model"] = Path(shown["model"]).name
    document = {"run": shown, "results": [asdict(result) for result in found]}
    (folder / "results.json").write_text(json.dumps(document, indent=1), "utf-8")
    (folder / "report.md").write_text(markdown(found), "utf-8")


def read(path: Path) -> list[Result]:
    """The results in a ``results.json``.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["results"]
        return [_result(row) for row in rows]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of `vllm-sepllm eval` ({error!r})") from None


def _result(row: dict[str, Any]) -> Result:
    values = {name: Estimate(**value) for name, value in row["values"].items()}
    counts = {name: (int(a), int(b)) for name, (a, b) in row["counts"].items()}
    return Result(**{**row, "values": values, "counts": counts})


def markdown(found: Sequence[Result]) -> str:
    """Tables of all kinds; intervals are 95 %."""
    parts = []
    for kind, table in _TABLES.items():
        own = [result for result in found if result.kind == kind]
        # the other tables have a column for the name
        named = by_name(own) if kind in (Texts.kind, Needles.kind) else {kind: own}
        for name, results_of_name in named.items():
            if len(named) > 1:
                parts.append(f"**{name}**")
            if results_of_name:
                parts.append("\n".join(table(results_of_name)))
    unfinished = {r.task: f"{r.num_items:,} of {r.num_asked:,}" for r in found if _is_partial(r)}
    if unfinished:
        tasks = ", ".join(f"{task}: {share}" for task, share in unfinished.items())
        parts.append(f"Not finished; items that all methods have answered: {tasks}.")
    return "\n\n".join(parts) + "\n"


def by_name(found: Sequence[Result]) -> dict[str, list[Result]]:
    """Name that a suite gives a task -> its results, of all contexts."""
    named: dict[str, list[Result]] = {}
    for result in found:
        named.setdefault(result.task.removesuffix(f"-{result.length}"), []).append(result)
    return named


def _is_partial(result: Result) -> bool:
    return result.num_items < result.num_asked


def _text_table(found: Sequence[Result]) -> list[str]:
    head = "| context | method | mean KV | of full | perplexity | ratio to full |"
    lines = [f"{head} to streaming-llm | KL | top-1 |"]
    lines += ["| --- | --- | ---: | ---: | --- | --- | --- | --- | --- |"]
    for result in found:
        rest = f"{_value(result, 'kl')} | {_value(result, 'top1')} |"
        lines.append(f"| {result.length:,} {_start(result)} {_perplexities(result)} | {rest}")
    return lines


def _needle_table(found: Sequence[Result]) -> list[str]:
    depths = list(found[0].counts)
    names = " | ".join(f"depth {depth}" for depth in depths)
    head = f"| context | method | KV at the question | of full | found | {names} |"
    lines = [head, "| --- | --- | ---: | ---: | --- |" + " --- |" * len(depths)]
    for result in found:
        share = _interval(result.values["found"], "{:.0%}")
        counts = " | ".join(f"{num}/{asked}" for num, asked in result.counts.values())
        lines.append(f"| {result.length:,} {_start(result)} {share} | {counts} |")
    return lines


def _scored_table(found: Sequence[Result]) -> list[str]:
    head = "| task | method | KV at the answer | of full | right | answer's perplexity |"
    lines = [f"{head} ratio to full | to streaming-llm |"]
    lines += ["| --- | --- | ---: | ---: | --- | --- | --- | --- |"]
    for result in found:
        right = _interval(result.values["right greedy"], "{:.0%}")
        lines.append(f"| {result.task} {_start(result)} {right} | {_perplexities(result)} |")
    return lines


def _generated_table(found: Sequence[Result]) -> list[str]:
    """Right answers in per cent, differences in points, questions that one method alone solves."""
    grades = [name.partition(" ")[2] for name in found[0].values if name.startswith("right ")]
    columns = [f"{g} | {g}: to full | to streaming-llm | gained, lost" for g in grades]
    lines = [f"| task | method | KV at the answer | of full | {' | '.join(columns)} |"]
    lines += ["| --- | --- | ---: | ---: |" + " --- | --- | --- | --- |" * len(grades)]
    for result in found:
        cells = []
        for grade in grades:
            cells.append(_interval(result.values[f"right {grade}"], "{:.1%}"))
            cells += [_points(result, f"{other} {grade}") for other in ("full", "rival")]
            gained = result.counts.get(grade)
            cells.append("" if gained is None else f"{gained[0]}, {gained[1]}")
        lines.append(f"| {result.task} {_start(result)} {' | '.join(cells)} |")
    return lines


_TABLES = {
    Texts.kind: _text_table,
    Needles.kind: _needle_table,
    Scored.kind: _scored_table,
    Generated.kind: _generated_table,
}


def _start(result: Result) -> str:
    return f"| {result.method} | {result.kept:,.0f} | {result.share:.0%} |"


def _perplexities(result: Result) -> str:
    perplexity = _interval(result.values["perplexity"], "{:.2f}")
    return f"{perplexity} | {_value(result, 'ratio')} | {_value(result, 'beside')}"


def _value(result: Result, measure: str) -> str:
    """Empty where a method would be compared with itself, or has nothing to be compared with."""
    return _interval(result.values[measure], "{:.3f}") if measure in result.values else ""


def _points(result: Result, measure: str) -> str:
    """A difference of shares in percentage points; empty as ``_value`` is."""
    if measure not in result.values:
        return ""
    value = result.values[measure]
    ends = [None if x is None else 100 * x for x in (value.mean, value.low, value.high)]
    return _interval(Estimate(ends[0] or 0.0, ends[1], ends[2]), "{:+.1f}")


def _interval(value: Estimate, form: str) -> str:
    if value.low is None or value.high is None:
        return form.format(value.mean)
    mean, low, high = (form.format(x) for x in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"
