"""A run goes on where it was stopped, and never mixes with another."""

import json
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
    Store(tmp_path, {"model": "m", "sizes": [1]}).write("text/64/full/a-0", {})
    with pytest.raises(ValueError, match="holds a run with another model, sizes; name another"):
        Store(tmp_path, {"model": "n", "sizes": [2]})


def test_a_run_without_cells_can_be_corrected(tmp_path: Path) -> None:
    Store(tmp_path, {"model": "m"})
    assert not (tmp_path / "run.json").exists()
    store = Store(tmp_path, {"model": "n"})
    store.write("text/64/full/a-0", {})
    assert json.loads((tmp_path / "run.json").read_text()) == {"model": "n"}


def test_rows_may_be_added_but_none_with_cells_may_change(tmp_path: Path) -> None:
    def store(**settings: object) -> Store:
        rows = {f"text/64/{name}": value for name, value in settings.items()}
        return Store(tmp_path, {"model": "m", "settings": rows})

    def recorded() -> dict[str, object]:
        return dict(json.loads((tmp_path / "run.json").read_text())["settings"])

    store(full=None, w={"window": 20}).write("text/64/full/a-0", {})
    # w has no cell
    store(full=None, w={"window": 30}).write("text/64/w/a-0", {})
    assert recorded() == {"text/64/full": None, "text/64/w": {"window": 30}}
    # a row that is left out is remembered
    store(full=None, x={"window": 40}).write("text/64/x/a-0", {})
    assert recorded().keys() == {"text/64/full", "text/64/w", "text/64/x"}
    for wrong in ({"full": None, "w": {"window": 20}}, {"w": {"window": 20}}):
        with pytest.raises(ValueError, match="another settings of text/64/w; name another"):
            store(**wrong)


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 1}', "\xff"])
def test_a_broken_description_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"run\.json is n.*; name another --output"):
        Store(tmp_path, {"model": "m"})
