"""The tables: what is compared with what, over which items, and how sure it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.eval_fakes import BOOKS, FACTS, NEEDLES, SEPLLM, Start, Watcher, questions
from vllm_sepllm.eval import report, run
from vllm_sepllm.eval.methods import DEFAULTS, Method, mean_kept
from vllm_sepllm.eval.questions import Question, Scored, answer_span
from vllm_sepllm.eval.statistics import block_bootstrap
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.text import Excerpt, Texts

METHODS = [
    Method("full", None),
    Method("sepllm", SEPLLM),
    *DEFAULTS[2:],
    Method("w40", {"window": 40}),
]


def measured(folder: Path, tasks: list[Any], methods: list[Method] = METHODS):
    rows, store = run.plan(tasks, methods, FACTS), Store(folder, {})
    run.run(rows, store, "m", {}, Watcher(), Start())
    return rows, store


def test_tables(tmp_path: Path) -> None:
    rows, store = measured(tmp_path, [BOOKS, NEEDLES])
    report.write(tmp_path, report.results(rows, store, FACTS), {"model": "m"})
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
    assert not [line for line in lines if "Not finished" in line]


def test_generated_answers_are_compared_in_pairs(tmp_path: Path) -> None:
    """Of ten questions the other method solves one that full attention does not, and loses two."""
    task = questions(10)
    rows = run.plan([task], [Method("full", None), Method("other", SEPLLM)], FACTS)
    store = Store(tmp_path, {})
    right = {"full": {1, 2, 3, 4}, "other": {3, 4, 5}}
    for name, own in right.items():
        for i in range(10):
            answer = {"text": "", "token_ids": [1] * (i + 1), "right": {"flexible": i in own}}
            store.add(f"gsm8k/{name}", str(i), answer)
    full, other = report.results(rows, store, FACTS)
    assert full.values["right flexible"].mean == pytest.approx(0.4)
    assert full.values.keys() == {"right flexible"}
    difference = other.values["full flexible"]
    assert difference.mean == pytest.approx(-0.1)
    assert difference.low < -0.1 < 0.1 < difference.high
    assert other.counts == {"flexible": (1, 2)}
    # at the queries that generated the answers: 100 to 100 + i keys of question i
    spans = [answer_span(item.prompt, [1] * (i + 1)) for i, item in enumerate(task.items)]
    assert full.kept == pytest.approx(
        np.concatenate([100 + np.arange(i + 1) for i in range(10)]).mean()
    )
    assert other.kept == pytest.approx(mean_kept(SEPLLM, spans, FACTS))
    line = report.markdown([full, other]).splitlines()[-1]
    assert "| gsm8k | other |" in line
    assert "| 30.0% (10.8% to 60.3%) | -10.0 (-40.0 to +20.0) |  | 1, 2 |" in line


def test_scored_answers_have_a_table_of_their_own(tmp_path: Path) -> None:
    task = Scored("qa", 90, tuple(Question(str(i), (1, 2), (3, 4)) for i in range(4)))
    rows = run.plan([task], METHODS[:3], FACTS)
    store = Store(tmp_path, {})
    for row, more in zip(rows, (0.0, 0.1, 0.3), strict=True):
        for i in range(4):
            store.add(row.key, str(i), {"nll": i + more, "right": {"greedy": i < 2}})
    found = report.results(rows, store, FACTS)
    ratio, beside = (found[1].values[measure] for measure in ("ratio", "beside"))
    # paired: the questions are of very unlike difficulty, the methods always as far apart
    assert [ratio.low, ratio.mean, ratio.high] == pytest.approx([np.exp(0.1)] * 3)
    assert [beside.low, beside.mean, beside.high] == pytest.approx([np.exp(-0.2)] * 3)
    line = next(x for x in report.markdown(found).splitlines() if x.startswith("| qa | sepllm |"))
    assert "| 50% (15% to 85%) |" in line
    assert line.endswith("| 1.105 (1.105 to 1.105) | 0.819 (0.819 to 0.819) |")


def test_a_run_that_goes_on_is_reported_over_the_questions_that_all_have_answered(
    tmp_path: Path,
) -> None:
    rows = run.plan([questions(5)], METHODS[:2], FACTS)
    store = Store(tmp_path, {})

    def answer(row: str, item: int, is_right: bool) -> None:
        right = dict.fromkeys(("strict", "flexible"), is_right)
        store.add(row, str(item), {"text": "", "token_ids": [1], "right": right})

    for i in range(4):
        answer("gsm8k/full", i, is_right=True)
    assert report.results(rows, store, FACTS) == []
    for i in (3, 1):
        answer("gsm8k/sepllm", i, is_right=i == 3)
    full, sepllm = report.results(rows, store, FACTS)
    assert (full.num_items, full.num_asked) == (2, 5)
    assert full.values["right strict"].mean == 1.0
    assert sepllm.values["right strict"].mean == 0.5
    text = report.markdown([full, sepllm])
    assert "Not finished; items that all methods have answered: gsm8k: 2 of 5." in text


def test_ratios_are_paired(tmp_path: Path) -> None:
    """Texts of very unlike difficulty, one method a tenth worse on every token of both."""
    methods = [
        Method("full", None),
        Method("other", {"window": 20}),
        Method("plain", {"preset": "streaming-llm"}, "other"),
    ]
    rows = run.plan([BOOKS], methods, FACTS)
    store, random = Store(tmp_path, {}), np.random.default_rng(0)
    for text in BOOKS.items:
        nll = random.uniform(0, 9, 640)
        for row, more in zip(rows, (0.0, 0.1, 0.3), strict=True):
            answer = {"nll": (nll + more).tolist(), "kl": [0.1] * 8, "top_ids": [1] * 640}
            store.add(row.key, text.name, answer)
    _, other, plain = report.results(rows, store, FACTS)
    for measure, nats in (("ratio", 0.1), ("beside", -0.2)):
        found = other.values[measure]
        assert [found.low, found.mean, found.high] == pytest.approx([np.exp(nats)] * 3)
    low, high = other.values["perplexity"].low, other.values["perplexity"].high
    assert high / low > 1.2
    assert "beside" not in plain.values


@pytest.mark.parametrize(("num_positions", "wanted"), [(4, 2), (25, 16), (100, 64), (2, 1)])
def test_divergences_of_64_tokens_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_positions: int, wanted: int
) -> None:
    """Of 99 scored tokens: positions 33, 4.1, 1 and 98 apart."""
    excerpt = replace(BOOKS.items[0], num_positions=num_positions)
    rows = run.plan([replace(BOOKS, items=(excerpt,))], [METHODS[0], METHODS[-1]], FACTS)
    store, blocks = Store(tmp_path, {}), []
    for row in rows:
        answer = {"nll": [1.0] * 99, "kl": [0.1] * num_positions, "top_ids": [1] * 99}
        store.add(row.key, excerpt.name, answer)

    def bootstrap(parts: Any, block: int) -> report.Estimate:
        blocks.append((len(parts[0]), block))
        return block_bootstrap(parts, block)

    monkeypatch.setattr(report, "block_bootstrap", bootstrap)
    report.results(rows, store, FACTS)
    assert (num_positions, wanted) in blocks


def test_no_interval_is_printed_as_none(tmp_path: Path) -> None:
    short = Texts("text-100", 100, (Excerpt("short-0", 100, tuple(range(99)), 2),))
    rows = run.plan([short], METHODS[:1], FACTS)
    store = Store(tmp_path, {})
    store.add("text-100/full", "short-0", {"nll": [0.0] * 49, "top_ids": [1] * 49})
    report.write(tmp_path, report.results(rows, store, FACTS), {})
    assert "| 100 | full | 74 | 100% | 1.00 |  |" in (tmp_path / "report.md").read_text()
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["values"]["perplexity"] == {"mean": 1.0, "low": None, "high": None}


def test_no_interval_is_drawn_as_no_bar(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    from vllm_sepllm.eval.plots import _errors, draw

    alone, other = report.Estimate(2.0, None, None), report.Estimate(2.0, 1.5, 4.0)
    assert np.isnan(_errors([alone])).all()
    assert _errors([other]) == [[0.5], [2.0]]
    values = {"ratio": alone, "kl": alone}
    found = [
        report.Result("text", f"text-{n}", n, 1, 1, "sepllm", {}, 300.0, 0.5, values)
        for n in (9, 99)
    ]
    assert len(draw(tmp_path, found)) == 2


def test_texts_of_several_names_are_told_apart(tmp_path: Path) -> None:
    """Their contexts may be the same."""
    pytest.importorskip("matplotlib", reason="an extra")
    from vllm_sepllm.eval.plots import draw

    values = dict.fromkeys(("perplexity", "ratio", "kl"), report.Estimate(2.0, 1.5, 4.0))
    found = [
        report.Result("text", f"{name}-{n}", n, 1, 1, "sepllm", {}, 300.0, 0.5, values)
        for name in ("books", "code")
        for n in (9, 99)
    ]
    parts = report.markdown(found).split("\n\n")
    assert [parts[0], parts[2]] == ["**books**", "**code**"]
    assert [part.count("| sepllm |") for part in parts] == [0, 2, 0, 2]
    names = [path.name for path in draw(tmp_path, found)]
    assert names == ["books.png", "books-kv.png", "code.png", "code-kv.png"]


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    from vllm_sepllm.eval.plots import draw

    rows, store = measured(tmp_path, [BOOKS, NEEDLES, questions(3)])
    drawn = draw(tmp_path, report.results(rows, store, FACTS))
    assert [path.name for path in drawn] == ["text.png", "kv.png", "needle.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_plots_are_drawn_again_from_stored_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the answers, and with what other machines may see alone."""
    pytest.importorskip("matplotlib")
    from vllm_sepllm.eval import plots

    rows, store = measured(tmp_path / "answers", [BOOKS, NEEDLES])
    found = report.results(rows, store, FACTS)
    report.write(tmp_path, found, {"model": str(tmp_path / "Some-Model")})
    stored = tmp_path / "results.json"
    assert report.read(stored) == found
    assert json.loads(stored.read_text())["run"] == {"model": "Some-Model"}
    assert str(tmp_path) not in stored.read_text()
    monkeypatch.setattr("sys.argv", ["plots", str(stored), str(tmp_path / "again")])
    plots.main()
    again = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert again == ["kv.png", "needle.png", "text.png"]


@pytest.mark.parametrize("content", ["[]", "{", '{"results": [{}]}', '{"results": [1]}'])
def test_what_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json holds no results of"):
        report.read(path)
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        report.read(tmp_path / "none.json")
