"""A run goes on where it was stopped, and never mixes with another."""

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_sepllm.eval.store import Store


def reopened(folder: Path, store: Store, run: dict[str, object]) -> Store:
    """As by the next process, which finds the lock free."""
    store.close()
    return Store(folder, run)


def test_answers_are_found_again(tmp_path: Path) -> None:
    run = {"model": "m", "sizes": (1, 2)}
    store = Store(tmp_path, run)
    assert store.answers("text-64/full") == {}
    store.write_array("text-64/full", "a-0", np.ones((2, 3), np.float32))
    # an array without its answer is no answer
    assert store.answers("text-64/full") == {}
    store.add("text-64/full", "a-0", {"nll": [0.5]})
    store.add("text-64/full", "a-1", {"nll": [1.5]})
    again = reopened(tmp_path, store, run)
    assert again.answers("text-64/full") == {"a-0": {"nll": [0.5]}, "a-1": {"nll": [1.5]}}
    assert again.answers("text-64/sepllm") == {}
    assert again.read_array("text-64/full", "a-0").tolist() == [[1, 1, 1], [1, 1, 1]]
    assert not list(tmp_path.rglob("*.part"))


def test_an_answer_is_on_the_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    for item in ("0", "1"):
        store.add("gsm8k/full", item, {"text": "line\nbreak\u2028"})
        lines = (tmp_path / "answers/gsm8k/full.jsonl").read_bytes().splitlines()
        assert json.loads(lines[-1]) == {"item": item, "text": "line\nbreak\u2028"}


@pytest.mark.parametrize("torn", ['{"item": "1", "te', '{"item": "1", "text": "b"}'])
def test_a_line_that_a_stop_has_torn_is_cut_off(tmp_path: Path, torn: str) -> None:
    """Also where the line is whole but for its end, as the next one would be put behind it."""
    store = Store(tmp_path, {})
    store.add("gsm8k/full", "0", {"text": "a"})
    path = tmp_path / "answers/gsm8k/full.jsonl"
    with path.open("a") as file:
        file.write(torn)
    again = reopened(tmp_path, store, {})
    assert again.answers("gsm8k/full") == {"0": {"text": "a"}}
    again.add("gsm8k/full", "1", {"text": "c"})
    last = reopened(tmp_path, again, {})
    assert last.answers("gsm8k/full") == {"0": {"text": "a"}, "1": {"text": "c"}}


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.add("gsm8k/full", "0", {})
    path = tmp_path / "answers/gsm8k/full.jsonl"
    path.write_text('{"item": "0"}\n[]\n')
    with pytest.raises(ValueError, match=r"full\.jsonl, line 2 is no answer"):
        reopened(tmp_path, store, {}).answers("gsm8k/full")


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    with pytest.raises(ValueError, match="another process writes"):
        Store(tmp_path, {})
    reopened(tmp_path, store, {})


def test_another_run_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, {"model": "m", "engine": {"dtype": "float32"}})
    store.add("text-64/full", "a-0", {})
    with pytest.raises(ValueError, match="holds a run with another engine, model; name another"):
        reopened(tmp_path, store, {"model": "n", "engine": {"dtype": "bfloat16"}})


def test_a_run_without_answers_can_be_corrected(tmp_path: Path) -> None:
    first = Store(tmp_path, {"model": "m"})
    assert not (tmp_path / "run.json").exists()
    store = reopened(tmp_path, first, {"model": "n"})
    store.add("text-64/full", "a-0", {})
    assert json.loads((tmp_path / "run.json").read_text())["model"] == "n"


@pytest.mark.parametrize("part", ["tasks", "settings"])
def test_what_may_be_added_may_not_change_where_it_has_answers(tmp_path: Path, part: str) -> None:
    """Tasks and rows alike: the keys of both are folders or files of answers."""
    stores: list[Store] = []

    def store(**described: object) -> Store:
        for old in stores:
            old.close()
        task = {"text-64": described} if part == "tasks" else {}
        rows = {f"text-64/{name}": value for name, value in described.items()}
        found = Store(tmp_path, {"tasks": task, "settings": {} if part == "tasks" else rows})
        stores.append(found)
        return found

    def recorded() -> dict[str, object]:
        return dict(json.loads((tmp_path / "run.json").read_text())[part])

    if part == "tasks":
        store(positions=5).add("text-64/full", "a-0", {})
        assert recorded() == {"text-64": {"positions": 5}}
        with pytest.raises(ValueError, match="another tasks of text-64; name another"):
            store(positions=6)
        return
    store(full=None, w={"window": 20}).add("text-64/full", "a-0", {})
    # w has no answer
    store(full=None, w={"window": 30}).add("text-64/w", "a-0", {})
    assert recorded() == {"text-64/full": None, "text-64/w": {"window": 30}}
    # a row that is left out is remembered
    store(full=None, x={"window": 40}).add("text-64/x", "a-0", {})
    assert recorded().keys() == {"text-64/full", "text-64/w", "text-64/x"}
    for wrong in ({"full": None, "w": {"window": 20}}, {"w": {"window": 20}}):
        with pytest.raises(ValueError, match="another settings of text-64/w; name another"):
            store(**wrong)


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 1}', '{"tasks": 1}', "\xff"])
def test_a_broken_description_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"run\.json is n.*; name another --output"):
        Store(tmp_path, {"model": "m"})
