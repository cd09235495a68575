"""A folder with the answers of a run, so that it goes on where it was stopped.

Every row of the report, such as ``gsm8k/sepllm``, is a file of JSON lines, one line an item,
written as soon as the item is answered.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_RUN, _ANSWERS, _LOCK = "run.json", "answers", ".lock"
# parts of run.json whose keys may come and go, but not change where they have answers
_BY_KEY = ("tasks", "settings")
_ITEM = "item"


class Store:
    """Answers by row and item."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it; no other process may use it until this one ends.

        Args:
            folder: of the run.
            run: what the answers depend on besides row and item. ``run["tasks"]`` describes each
                task by its name, ``run["settings"]`` each row by its key: those may come and go,
                but none may change that has answers.

        Raises:
            ValueError: if the folder holds answers of another run, or another process writes it.
            OSError: if the folder cannot be made.
        """
        self.folder = folder
        self._run = json.loads(json.dumps(run))
        self._is_recorded = False
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process writes {folder}; wait for its end, or name another --output"
            ) from None
        try:
            found = _read_object(folder / _RUN)
            # run.json comes before the first answer, and says nothing without one
            if self._has_answers(""):
                self._go_on(found)
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write; the end of this one does as well."""
        self._lock.close()

    def _go_on(self, found: dict[str, Any]) -> None:
        """Refuse another run; remember the tasks and rows that this one leaves out."""
        wanted = dict(self._run)
        changed, kept = [], {}
        for part in _BY_KEY:
            before, now = found.pop(part, {}), wanted.pop(part, {})
            for key in sorted(filter(self._has_answers, now)):
                if key not in before or before[key] != now[key]:
                    changed.append(f"{part} of {key}")
            kept[part] = {k: v for k, v in before.items() if self._has_answers(k)} | now
        changed += sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with another {', '.join(changed)}; name another "
                "--output, or go on with the same suite, under the same defaults of sepllm"
            )
        self._run |= kept

    def _has_answers(self, key: str) -> bool:
        """Whether a row, any row of a task or (with "") any row at all has an answer."""
        path = self.folder / _ANSWERS / key
        return path.with_name(f"{path.name}.jsonl").exists() or any(path.rglob("*.jsonl"))

    def _path(self, row: str) -> Path:
        return self.folder / _ANSWERS / f"{row}.jsonl"

    def answers(self, row: str) -> dict[str, dict[str, Any]]:
        """Answers of a row by item; not to be written to."""
        if row not in self._rows:
            path = self._path(row)
            self._rows[row] = _read_lines(path) if path.exists() else {}
        return self._rows[row]

    def add(self, row: str, item: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer; a stop in between leaves none behind.

        The first one of this run is written behind what the run depends on.
        """
        known = self.answers(row)
        if not self._is_recorded:
            _write(self.folder / _RUN, json.dumps(self._run, indent=2).encode())
            self._is_recorded = True
        path = self._path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({_ITEM: item, **answer}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        known[item] = dict(answer)

    def read_array(self, row: str, item: str) -> npt.NDArray[np.float32]:
        """An array that stands beside an answer."""
        array: npt.NDArray[np.float32] = np.load(self._array_path(row, item))
        return array

    def write_array(self, row: str, item: str, array: npt.NDArray[np.float32]) -> None:
        """Write an array, before its answer: so a kept answer has its array."""
        path = self._array_path(row, item)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)

    def _array_path(self, row: str, item: str) -> Path:
        return self.folder / _ANSWERS / row / f"{item}.npy"


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Answers of a row; cuts off a last line that a stop has left unfinished.

    Raises:
        ValueError: if another line is no answer.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            answer = json.loads(line)
            found[str(answer.pop(_ITEM))] = answer
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no answer ({error!r}); delete it") from None
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); name another --output") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(k, {}), dict) for k in _BY_KEY):
        raise ValueError(f"{path} is no description of a run; name another --output")
    return found


def _write(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(content)
    os.replace(draft, path)
