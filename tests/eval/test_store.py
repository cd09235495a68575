"""A run goes on where it was stopped, and never mixes with another."""

from pathlib import Path

import numpy as np
import pytest

from vllm_sepllm.eval.store import Store


def test_finished_cells_are_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path, {"model": "m", "sizes": (1, 2)})
    assert not store.has("text/64/full/a-0")
    store.write_array("text/64/full/a-0", np.ones((2, 3), np.float32))
    # an array without its cell is no finished cell
    assert not store.has("text/64/full/a-0")
    store.write("text/64/full/a-0", {"nll": [0.5]})
    again = Store(tmp_path, {"model": "m", "sizes": (1, 2)})
    assert again.has("text/64/full/a-0")
    assert again.read("text/64/full/a-0") == {"nll": [0.5]}
    assert again.read_array("text/64/full/a-0").tolist() == [[1, 1, 1], [1, 1, 1]]
    assert not list(tmp_path.rglob("*.part"))


def test_another_run_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, {"model": "m", "sizes": [1]})
    with pytest.raises(ValueError, match="holds a run with another model, sizes; name another"):
        Store(tmp_path, {"model": "n", "sizes": [2]})
