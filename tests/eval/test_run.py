"""The order of the work, what a stopped run repeats, and the tables."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from vllm_sepllm.eval import report, suite
from vllm_sepllm.eval.engine import Scores
from vllm_sepllm.eval.methods import Method, ModelFacts, Wanted
from vllm_sepllm.eval.needle import Needle
from vllm_sepllm.eval.statistics import block_bootstrap
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.text import Excerpt

FACTS = ModelFacts(lambda spec: () if spec == () else (0,), num_layers=4, max_model_len=200)
TEXTS = [Excerpt(f"book-{i}", 200, tuple(j % 9 for j in range(199)), 4) for i in range(2)]
SHORT = Excerpt("short-0", 100, tuple(range(99)), 2)
NEEDLES = [Needle(f"{d}-0", 150, d, tuple(j % 9 for j in range(120)), "123") for d in (0.0, 0.5)]
SEPLLM = {"window": 20}
WANTED = Wanted(SEPLLM, also=[Method("w40", {"window": 40})])


class FakeEngine:
    """Every token has probability one half; with sepllm's window alone the numbers are found."""

    started: list[Any]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def score(self, token_ids: Any, positions: Any) -> Scores:
        rows = torch.full((len(positions), 2), 0.5).log()
        num = len(token_ids) - 1
        top = 1 if self.settings == SEPLLM else 0
        return Scores([-0.6931471805599453] * num, [top] * num, rows)

    def answer(self, prompts: Any, _max_tokens: int) -> list[str]:
        return ["it is 123" if self.settings == SEPLLM else "I do not know"] * len(prompts)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Settings of each engine that was started, with its arguments."""
    started: list[Any] = []

    @contextmanager
    def running(_model: str, settings: Any, **arguments: Any) -> Iterator[FakeEngine]:
        started.append((settings, arguments))
        yield FakeEngine(settings)

    for item in (Excerpt, Needle):
        monkeypatch.setattr(item, "opened", staticmethod(running))
    return started


def test_one_engine_for_the_cells_of_the_same_settings(tmp_path: Path, engines: list[Any]) -> None:
    groups = suite.plan([*TEXTS, *NEEDLES], WANTED, FACTS)
    names = ["full", "sepllm", "streaming-llm", "fixed-interval", "w40"]
    assert [g.method.name for g in groups] == names * 2
    assert [g.suite for g in groups] == ["text"] * 5 + ["needle"] * 5
    store, done = Store(tmp_path, {}), []
    arguments = {"max_model_len": 200, "dtype": "float32"}
    suite.run(groups, store, "m", arguments, done.append)
    assert len(done) == 20
    assert engines[0] == (None, arguments)
    # full, sepllm and w40 once for both suites
    assert len(engines) == len({str(g.method.settings) for g in groups}) < 8
    engines.clear()
    (tmp_path / "cells/needle/150/w40/0.5-0.json").unlink()
    suite.run(groups, store, "m", arguments, done.append)
    # with the same bound of separators, also where only the shorter contexts are left
    assert engines == [({"window": 40}, arguments)]
    assert len(done) == 40


def test_tables(tmp_path: Path, engines: list[Any]) -> None:
    groups = suite.plan([*TEXTS, *NEEDLES], WANTED, FACTS)
    store = Store(tmp_path, {})
    suite.run(groups, store, "m", {}, lambda _key: None)
    found = report.rows(groups, store)
    report.write(tmp_path, found, {"model": "m"})
    lines = (tmp_path / "report.md").read_text().splitlines()
    # queries 99 to 198 read 150 keys on average
    assert "| 200 | full | 150 | 100% | 2.00 (2.00 to 2.00) |  |  |  |  |" in lines
    sepllm = next(line for line in lines if line.startswith("| 200 | sepllm |"))
    assert "| 2.00 (2.00 to 2.00) | 1.000 (1.000 to 1.000) | 1.000 (1.0" in sepllm
    assert sepllm.endswith("| 0.000 (0.000 to 0.000) |")
    w40 = next(line for line in lines if line.startswith("| 200 | w40 |"))
    assert w40.endswith("| 1.000 (1.000 to 1.000) |")
    needle = [line for line in lines if line.startswith("| 150 |")]
    assert [line.split("|")[-3:-1] for line in needle] == [
        [" 0/1 ", " 0/1 "],
        [" 1/1 ", " 1/1 "],
        *[[" 0/1 ", " 0/1 "]] * 3,
    ]
    assert engines


def test_tasks_have_a_table_of_their_own(tmp_path: Path) -> None:
    right = {"right": report.wilson(1, 2)}
    row = report.Row("task", 900, "gsm8k", "sepllm", {}, 300.0, 0.5, right, {})
    start = "| gsm8k | sepllm | 300 | 50% | 50% (9% to 91%) |"
    assert f"{start}  |  |  |" in report.markdown([row])
    half = report.Estimate(2.0, 1.0, 3.0)
    scored = replace(row, values=right | dict.fromkeys(("perplexity", "ratio", "beside"), half))
    end = "2.00 (1.00 to 3.00) | 2.000 (1.000 to 3.000) | 2.000 (1.000 to 3.000) |"
    assert f"{start} {end}" in report.markdown([scored])


def test_ratios_are_paired(tmp_path: Path) -> None:
    """Texts of very unlike difficulty, one method a tenth worse on every token of both."""
    method = Method("other", {"window": 20}, "streaming-llm")
    cells = tuple(suite.Cell(text, method) for text in TEXTS)
    group = suite.Group("text", 200, method, 1.0, 1.0, cells)
    store, random = Store(tmp_path, {}), np.random.default_rng(0)
    for text in TEXTS:
        nll = random.uniform(0, 9, 640)
        for name, more in (("full", 0.0), ("other", 0.1), ("streaming-llm", 0.3)):
            cell = {"nll": (nll + more).tolist(), "kl": [0.1] * 8, "top_ids": [1] * 640}
            store.write(suite.cell_key(text, name), cell)
    (row,) = report.rows([group], store)
    for measure, nats in (("ratio", 0.1), ("beside", -0.2)):
        found = row.values[measure]
        assert [found.low, found.mean, found.high] == pytest.approx([np.exp(nats)] * 3)
    low, high = row.values["perplexity"].low, row.values["perplexity"].high
    assert high / low > 1.2


@pytest.mark.parametrize(("num_positions", "wanted"), [(4, 2), (25, 16), (100, 64), (2, 1)])
def test_divergences_of_64_tokens_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_positions: int, wanted: int
) -> None:
    """Of 99 scored tokens: positions 33, 4.1, 1 and 98 apart."""
    excerpt = replace(TEXTS[0], num_positions=num_positions)
    method = Method("w40", {"window": 40})
    group = suite.Group("text", 200, method, 1.0, 1.0, (suite.Cell(excerpt, method),))
    store, blocks = Store(tmp_path, {}), []
    cell = {"nll": [1.0] * 99, "kl": [0.1] * num_positions, "top_ids": [1] * 99}
    for name in ("full", "w40"):
        store.write(suite.cell_key(excerpt, name), cell)

    def bootstrap(parts: Any, block: int) -> report.Estimate:
        blocks.append((len(parts[0]), block))
        return block_bootstrap(parts, block)

    monkeypatch.setattr(report, "block_bootstrap", bootstrap)
    report.rows([group], store)
    assert (num_positions, wanted) in blocks


def test_no_interval_is_printed_as_none(tmp_path: Path) -> None:
    method = Method("full", None)
    group = suite.Group("text", 100, method, 75.0, 75.0, (suite.Cell(SHORT, method),))
    store = Store(tmp_path, {})
    store.write(group.cells[0].key, {"nll": [0.0] * 49, "top_ids": [1] * 49})
    found = report.rows([group], store)
    report.write(tmp_path, found, {})
    assert "| 100 | full | 75 | 100% | 1.00 |  |" in (tmp_path / "report.md").read_text()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["values"]["perplexity"] == {"mean": 1.0, "low": None, "high": None}


def test_no_interval_is_drawn_as_no_bar(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    from vllm_sepllm.eval.plots import _errors, draw

    alone, other = report.Estimate(2.0, None, None), report.Estimate(2.0, 1.5, 4.0)
    assert np.isnan(_errors([alone])).all()
    assert _errors([other]) == [[0.5], [2.0]]
    values = {"ratio": alone, "kl": alone}
    rows = [
        report.Row("text", length, "a", "sepllm", {}, 300.0, 0.5, values, {}) for length in (9, 99)
    ]
    assert len(draw(tmp_path, rows)) == 2


def test_plots_are_drawn(tmp_path: Path, engines: list[Any]) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    from vllm_sepllm.eval.plots import draw

    groups = suite.plan([*TEXTS, *NEEDLES], WANTED, FACTS)
    store = Store(tmp_path, {})
    suite.run(groups, store, "m", {}, lambda _key: None)
    drawn = draw(tmp_path, report.rows(groups, store))
    assert [path.name for path in drawn] == ["text.png", "kv.png", "needle.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
