"""A folder with one JSON file per finished cell, so that a run goes on where it was stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_RUN = "run.json"


class Store:
    """Cells by key, such as ``text/4096/sepllm/book-0``."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """``run`` is what the cells depend on besides their key.

        Raises:
            ValueError: if the folder holds cells of another run.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _RUN
        wanted = json.loads(json.dumps(run))
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            if changed:
                raise ValueError(
                    f"{folder} holds a run with another {', '.join(changed)}; name another "
                    "--output, or give the same options to go on"
                )
        else:
            _write(path, json.dumps(wanted, indent=2).encode())

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / "cells" / f"{key}{suffix}"

    def has(self, key: str) -> bool:
        """Whether the cell is finished."""
        return self._path(key, ".json").exists()

    def read(self, key: str) -> dict[str, Any]:
        """A finished cell."""
        cell: dict[str, Any] = json.loads(self._path(key, ".json").read_text("utf-8"))
        return cell

    def write(self, key: str, cell: Mapping[str, Any]) -> None:
        """Finish a cell; a stop in between leaves none behind."""
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


def _write(path: Path, content: bytes) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(content)
    os.replace(draft, path)
