"""Progress of an evaluation: a line that moves on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from vllm_sepllm.cli.console import make_console

if TYPE_CHECKING:
    from vllm_sepllm.eval.run import Row

# seconds between two lines of a log
_PAUSE = 60


class Progress:
    """Watches a run (eval/run.py); a context manager that ends the moving line."""

    def __init__(self, total: int, num_known: int, after_round: Callable[[], Any]) -> None:
        """Nothing was answered yet.

        Args:
            total: items of the run, over all methods.
            num_known: of those, answered by an earlier run.
            after_round: called when all methods have answered as many items.
        """
        self._total, self._done = total, num_known
        self._num_new = 0
        self._after_round = after_round
        self._began = self._said = time.monotonic()
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[rate]}"), console=make_console())
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=self._total, completed=self._done, rate=self._rate()
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def starting(self, method: str) -> None:
        """An engine starts for a method."""
        self._say(f"starting {method}", now=True)

    def answered(self, row: "Row") -> None:
        """An item of a row has been answered and stored."""
        self._done += 1
        self._num_new += 1
        self._say(row.key, now=self._done == self._total)

    def finished_round(self) -> None:
        """All methods have answered as many items."""
        self._after_round()

    def _rate(self) -> str:
        if not self._num_new:
            return ""
        seconds = (time.monotonic() - self._began) / self._num_new
        left = timedelta(seconds=round(seconds * (self._total - self._done)))
        return f"{seconds:.2f} s an answer, {left} left"

    def _say(self, doing: str, now: bool) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=doing, completed=self._done, rate=self._rate())
            return
        if now or time.monotonic() - self._said > _PAUSE:
            self._said = time.monotonic()
            clock, rate = time.strftime("%H:%M:%S"), self._rate()
            text = f"[eval] {clock} {doing}: {self._done:,} of {self._total:,}"
            print(f"{text}, {rate}" if rate else text, flush=True)
