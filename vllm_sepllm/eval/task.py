"""Tasks of a suite: lists of items, one request each, that every method is asked."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_sepllm.eval.engine import Engine
from vllm_sepllm.eval.methods import FULL, Span
from vllm_sepllm.eval.store import Store


@dataclass(frozen=True)
class Task(ABC):
    """Items of one kind that share a budget of KV: the answers of each method are one row.

    Attributes:
        name: unlike that of any other task of the suite; a folder of the store.
        length: context that the longest item needs.
        items: all that there are, each with a ``name`` of its own and the ``span`` of its tokens at
            which kept ones are counted; windows are chosen on them.
        num_asked: how many of them are asked, from the first; None: all.
        num_a_round: items that all methods answer before the next ones begin; None: all.
    """

    name: str
    length: int
    items: tuple[Any, ...]
    num_asked: int | None = None
    num_a_round: int | None = None

    kind: ClassVar[str]  # rows of one kind share a table

    @property
    def asked(self) -> tuple[Any, ...]:
        """The items that are asked."""
        return self.items[: self.num_asked]

    @property
    def rounds(self) -> list[tuple[Any, ...]]:
        """The items that are asked, by rounds."""
        asked = self.asked
        size = self.num_a_round or len(asked)
        return [asked[start : start + size] for start in range(0, len(asked), size)]

    def row(self, method: str) -> str:
        """Where the answers under a method are stored."""
        return f"{self.name}/{method}"

    @property
    def full_row(self) -> str:
        """The row of full attention, which the others are compared with."""
        return self.row(FULL)

    def spans(self, items: Sequence[Any], answers: Sequence[Mapping[str, Any]]) -> list[Span]:
        """Where the KV of answered items is counted."""
        return [item.span for item in items]

    @abstractmethod
    def run(
        self, engine: Engine, items: Sequence[Any], row: str, store: Store
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and answers of ``items`` as they come; ``row`` is the method's, for arrays."""
