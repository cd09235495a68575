"""A folder with one JSON file per finished cell, so that a run goes on where it was stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_RUN, _CELLS, _SETTINGS = "run.json", "cells", "settings"


class Store:
    """Cells by key, such as ``text/4096/sepllm/book-0``."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it.

        Args:
            folder: of the run.
            run: what the cells depend on besides their key. ``run["settings"]`` has those of each
                row, by ``text.row_key``: rows may come and go, but none may change that has cells.

        Raises:
            ValueError: if the folder holds cells of another run.
            OSError: if the folder cannot be made.
        """
        self.folder = folder
        self._run = json.loads(json.dumps(run))
        self._is_recorded = False
        folder.mkdir(parents=True, exist_ok=True)
        found = _read_object(folder / _RUN)
        # run.json comes before the first cell, and says nothing without one
        if self._has_cells(""):
            self._go_on(found)

    def _go_on(self, found: dict[str, Any]) -> None:
        """Refuse another run; remember the rows that this one leaves out."""
        wanted = dict(self._run)
        before, now = found.pop(_SETTINGS, {}), wanted.pop(_SETTINGS, {})
        changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        for row in sorted(filter(self._has_cells, now)):
            if row not in before or before[row] != now[row]:
                changed.append(f"{_SETTINGS} of {row}")
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with another {', '.join(changed)}; name another "
                "--output, or give the same options to go on"
            )
        kept = {row: settings for row, settings in before.items() if self._has_cells(row)}
        self._run[_SETTINGS] = kept | now

    def _has_cells(self, row: str) -> bool:
        return any((self.folder / _CELLS / row).rglob("*.json"))

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / _CELLS / f"{key}{suffix}"

    def has(self, key: str) -> bool:
        """Whether the cell is finished."""
        return self._path(key, ".json").exists()

    def read(self, key: str) -> dict[str, Any]:
        """A finished cell."""
        cell: dict[str, Any] = json.loads(self._path(key, ".json").read_text("utf-8"))
        return cell

    def write(self, key: str, cell: Mapping[str, Any]) -> None:
        """Finish a cell; a stop in between leaves none behind.

        The first one of this run is written behind what the run depends on.
        """
        if not self._is_recorded:
            _write(self.folder / _RUN, json.dumps(self._run, indent=2).encode())
            self._is_recorded = True
        _write(self._path(key, ".json"), json.dumps(cell).encode())

    def read_array(self, key: str) -> npt.NDArray[np.float32]:
        """An array that stands beside a cell."""
        array: npt.NDArray[np.float32] = np.load(self._path(key, ".npy"))
        return array

    def write_array(self, key: str, array: npt.NDArray[np.float32]) -> None:
        """Before its cell, so that a finished cell has its array."""
        path = self._path(key, ".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); name another --output") from None
    if not isinstance(found, dict) or not isinstance(found.get(_SETTINGS, {}), dict):
        raise ValueError(f"{path} is no description of a run; name another --output")
    return found


def _write(path: Path, content: bytes) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(content)
    os.replace(draft, path)
