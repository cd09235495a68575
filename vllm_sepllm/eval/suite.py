"""Which cells a run has, in which order, and how it goes on where it was stopped."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_sepllm.eval.methods import FULL, Method, ModelFacts, Span, Wanted, mean_kept, methods
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.text import Excerpt, cell_key, row_key


class Item(Protocol):
    """What a cell computes: an excerpt, a needle, a task."""

    @property
    def suite(self) -> str:
        """Rows of one suite share a table."""

    @property
    def name(self) -> str:
        """Unlike that of any other item of the suite and the length."""

    @property
    def length(self) -> int:
        """Context that the item needs."""

    @property
    def spans(self) -> list[Span]:
        """Its requests, and the queries at which kept tokens are counted."""

    @property
    def opened(self) -> Callable[..., AbstractContextManager[Any]]:
        """Starts the engine that ``run`` takes, from model, settings and vLLM's arguments."""

    def run(self, engine: Any, method: str, store: Store) -> dict[str, Any]:
        """The cell."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One item under one method."""

    item: Item
    method: Method

    @property
    def key(self) -> str:
        """Its place in the store."""
        return cell_key(self.item, self.method.name)


@dataclass(frozen=True, slots=True)
class Group:
    """All items of one suite and length under one method: a row of the report.

    Attributes:
        kept: mean keys per scored query and layer.
        kept_by_full: the same with full attention.
    """

    suite: str
    length: int
    method: Method
    kept: float
    kept_by_full: float
    cells: tuple[Cell, ...]

    @property
    def row(self) -> str:
        """Its place in the store, above its cells."""
        return row_key(self.suite, self.length, self.method.name)


def plan(items: Sequence[Item], wanted: Wanted, facts: ModelFacts) -> list[Group]:
    """The rows: full attention, sepllm, the others at equal mean KV, and what was asked for.

    Raises:
        ValueError: if settings do not go with the model.
    """
    groups = []
    for suite, length in sorted({(item.suite, item.length) for item in items}, reverse=True):
        chosen = [i for i in items if (i.suite, i.length) == (suite, length)]
        spans = [span for item in chosen for span in item.spans]
        full = mean_kept(None, spans, facts)
        for method in methods(wanted, spans, facts):
            cells = tuple(Cell(item, method) for item in chosen)
            kept = mean_kept(method.settings, spans, facts)
            groups.append(Group(suite, length, method, kept, full, cells))
    return sorted(groups, key=lambda g: (g.suite != Excerpt.suite, g.length))


def run(
    groups: Sequence[Group],
    store: Store,
    model: str,
    arguments: Mapping[str, Any],
    advance: Callable[[str], None],
) -> None:
    """Compute what the store lacks, with one engine for all cells of the same kind and settings.

    Args:
        groups: of ``plan``.
        store: where cells are kept.
        model: folder or name.
        arguments: of ``vllm.LLM``, besides those of the method; their max_model_len is that of
            ``plan``'s facts.
        advance: called with the key of each cell that is finished, or was before.
    """
    by_engine: dict[tuple[Callable[..., Any], str], list[Cell]] = {}
    # full attention first: the others are compared with it
    for group in sorted(groups, key=lambda g: g.method.name != FULL):
        settings = json.dumps(group.method.settings, sort_keys=True)
        for cell in group.cells:
            by_engine.setdefault((cell.item.opened, settings), []).append(cell)
    for (opened, _), cells in by_engine.items():
        missing = [cell for cell in cells if not store.has(cell.key)]
        for cell in cells:
            if cell not in missing:
                advance(cell.key)
        if not missing:
            continue
        with opened(model, cells[0].method.settings, **arguments) as engine:
            for cell in missing:
                result = cell.item.run(engine, cell.method.name, store)
                store.write(cell.key, result)
                advance(cell.key)
