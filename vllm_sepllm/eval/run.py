"""Order of a run: which items are asked of which method, and where a stopped run goes on."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_sepllm.eval import engine
from vllm_sepllm.eval.methods import Method, ModelFacts, resolve, rival
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.task import Task


@dataclass(frozen=True, slots=True)
class Row:
    """A task under a method: a row of the report.

    Attributes:
        rival: name of the StreamingLLM of the same mean KV; None if there is none.
    """

    task: Task
    method: Method
    rival: str | None

    @property
    def key(self) -> str:
        """Its place in the store."""
        return self.task.row(self.method.name)


class Watcher(Protocol):
    """Is told of what happens."""

    def starting(self, method: str) -> None:
        """An engine starts for a method."""

    def answered(self, row: Row) -> None:
        """An item of a row has been answered and stored."""

    def finished_round(self) -> None:
        """All methods have answered as many items."""


def plan(tasks: Sequence[Task], methods: Sequence[Method], facts: ModelFacts) -> list[Row]:
    """The rows, with the windows that were left to choose.

    Raises:
        ValueError: if settings do not go with the model.
    """
    rows = []
    for task in tasks:
        spans = [item.span for item in task.items]
        for method in resolve(methods, spans, facts):
            other = rival(method, methods)
            rows.append(Row(task, method, other.name if other else None))
    return rows


def missing(rows: Sequence[Row], store: Store) -> int:
    """Items that are still to be answered."""
    return sum(item.name not in store.answers(row.key) for row in rows for item in row.task.asked)


def engines(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share an engine, full attention first: the others are compared with it."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.method.settings is not None):
        settings = json.dumps(row.method.settings, sort_keys=True)
        found.setdefault(settings, []).append(row)
    return list(found.values())


def run(
    rows: Sequence[Row],
    store: Store,
    model: str,
    arguments: Mapping[str, Any],
    watcher: Watcher,
    start: Callable[..., AbstractContextManager[Any]] | None = None,
) -> None:
    """Ask what the store lacks, round by round, in each with one engine for equal settings.

    Args:
        rows: of :func:`plan`.
        store: where answers are kept, each as soon as it is there.
        model: folder or name.
        arguments: of ``vllm.LLM``, besides those of the method; their max_model_len is that of
            ``plan``'s facts.
        watcher: is told of what happens.
        start: an engine, from model, settings and arguments; default :func:`engine.running`.
    """
    by_engine = engines(rows)
    for number in range(max(len(row.task.rounds) for row in rows)):
        had_work = False
        for group in by_engine:
            work = [(row, left) for row in group if (left := _left(row, number, store))]
            if not work:
                continue
            had_work = True
            method = group[0].method
            watcher.starting(method.name)
            with (start or engine.running)(model, method.settings, **arguments) as running:
                for row, items in work:
                    for name, answer in row.task.run(running, items, row.key, store):
                        store.add(row.key, name, answer)
                        watcher.answered(row)
        if had_work:
            watcher.finished_round()


def _left(row: Row, number: int, store: Store) -> list[Any]:
    """Items of a round that the store lacks."""
    rounds, answers = row.task.rounds, store.answers(row.key)
    if number >= len(rounds):
        return []
    return [item for item in rounds[number] if item.name not in answers]
