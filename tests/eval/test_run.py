"""The order of the work, and what a stopped run repeats."""

from itertools import groupby
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.support.eval_fakes import BOOKS, FACTS, NEEDLES, SEPLLM, Start, Watcher, questions
from vllm_sepllm.eval import run as suite
from vllm_sepllm.eval.methods import DEFAULTS, Method
from vllm_sepllm.eval.store import Store

METHODS = [
    Method("full", None),
    Method("sepllm", SEPLLM),
    *DEFAULTS[2:],
    Method("w40", {"window": 40}),
]
ARGUMENTS = {"max_model_len": 200, "dtype": "float32"}


def test_one_engine_for_the_rows_of_the_same_settings(tmp_path: Path) -> None:
    rows = suite.plan([BOOKS, NEEDLES], METHODS, FACTS)
    names = ["full", "sepllm", "streaming-llm", "fixed-interval", "w40"]
    assert [row.method.name for row in rows] == names * 2
    assert [row.rival for row in rows] == [None, *["streaming-llm"] * 3, None] * 2
    store, start, watcher = Store(tmp_path, {}), Start(), Watcher()
    assert suite.missing(rows, store) == 20
    suite.run(rows, store, "m", ARGUMENTS, watcher, start)
    assert suite.missing(rows, store) == 0
    assert watcher.num_rounds == 1
    assert start.started[0] == (None, ARGUMENTS)
    # full, sepllm and w40 once for both tasks
    assert len(start.started) == len({str(row.method.settings) for row in rows}) < 8


def test_a_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    rows = suite.plan([BOOKS, NEEDLES], METHODS, FACTS)
    store = Store(tmp_path, {})
    suite.run(rows, store, "m", ARGUMENTS, Watcher(), Start())
    store.close()
    path = tmp_path / "answers/needle-150/w40.jsonl"
    first, _ = path.read_text().splitlines()
    path.write_text(f"{first}\n")
    store, start, watcher = Store(tmp_path, {}), Start(), Watcher()
    assert suite.missing(rows, store) == 1
    suite.run(rows, store, "m", ARGUMENTS, watcher, start)
    # with the same bound of separators, also where only the shorter contexts are left
    assert start.started == [({"window": 40}, ARGUMENTS)]
    assert watcher.answers == ["start w40", "needle-150/w40"]
    assert watcher.num_rounds == 1
    start.started.clear()
    suite.run(rows, store, "m", ARGUMENTS, watcher, start)
    assert start.started == []
    assert watcher.num_rounds == 1


def test_all_methods_answer_a_round_before_the_next_one_begins(tmp_path: Path) -> None:
    task = questions(8, num_asked=7, num_a_round=3)
    rows = suite.plan([task], METHODS[:2], FACTS)
    store, start, watcher = Store(tmp_path, {}), Start(), Watcher()
    suite.run(rows, store, "m", ARGUMENTS, watcher, start)
    told = [(name, len(list(same))) for name, same in groupby(watcher.answers)]
    both = [("start full", 1), ("gsm8k/full", 3), ("start sepllm", 1), ("gsm8k/sepllm", 3)]
    assert told[:8] == both * 2
    assert [num for _, num in told[8:]] == [1, 1, 1, 1]
    assert watcher.num_rounds == 3
    assert set(store.answers("gsm8k/sepllm")) == {str(i) for i in range(7)}


def test_a_stop_in_a_batch_keeps_the_answers_before_it(tmp_path: Path) -> None:
    task = questions(5)
    rows = suite.plan([task], METHODS[:2], FACTS)
    store, start = Store(tmp_path, {}), Start()
    start.stops_after = 2
    with pytest.raises(KeyboardInterrupt):
        suite.run(rows, store, "m", ARGUMENTS, Watcher(), start)
    store.close()
    again = Store(tmp_path, {})
    assert set(again.answers("gsm8k/full")) == {"4", "3"}
    start, watcher = Start(), Watcher()
    suite.run(rows, again, "m", ARGUMENTS, watcher, start)
    assert watcher.answers.count("gsm8k/full") == 3
    assert suite.missing(rows, again) == 0


def test_more_questions_are_asked_later_of_the_same_methods(tmp_path: Path) -> None:
    """Windows are chosen on all questions, so the rows stay what they were."""
    few, more = (suite.plan([questions(9, num_asked=n)], METHODS, FACTS) for n in (2, 5))
    assert [row.method for row in few] == [row.method for row in more]
    assert [row.task.length for row in few] == [row.task.length for row in more]
    store = Store(tmp_path, {})
    suite.run(few, store, "m", ARGUMENTS, Watcher(), Start())
    assert suite.missing(more, store) == 3 * len(METHODS)
