"""The harness's arithmetic and its gate, with sides that answer from memory."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_sepllm.bench import __main__ as command
from vllm_sepllm.bench import suites
from vllm_sepllm.bench.outside import measures
from vllm_sepllm.bench.results import Results, spread
from vllm_sepllm.bench.sides import arguments_of, server_flags
from vllm_sepllm.bench.suites import SUITES, Work, gate
from vllm_sepllm.processes import engine_environment


class FakeSide:
    """Answers at once; a request takes ``seconds`` for each token."""

    def __init__(self, seconds: float, token: int = 7) -> None:
        self.seconds, self.token = seconds, token

    def do(self, command: str, **arguments: Any) -> Any:
        if command == "compact_length":
            return 3
        prompts, n = arguments["prompts"], arguments["max_tokens"]
        stamps = {
            "queued_ts": 0.0,
            "scheduled_ts": 1.0,
            "first_token_ts": 2.0,
            "last_token_ts": 2.0 + (n - 1) * self.seconds,
        }
        return {
            "seconds": self.seconds,
            "token_ids": [[self.token] * n for _ in prompts],
            "requests": [stamps for _ in prompts],
        }


WORK = Work(text=list(range(50)), lengths=[20], batches=[2], max_tokens=5, rounds=3)


def test_spread_is_inside_the_samples() -> None:
    assert spread([5.0]) == {"p20": 5.0, "p50": 5.0, "p80": 5.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


def test_decode_leaves_out_stock_where_the_budget_is_too_small(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sides = {"stock": FakeSide(1.0), "sepllm": FakeSide(2.0)}
    needed = 2 * (20 + 5)  # both requests of WORK, prompt and answer
    for budget, stock in ((needed - 1, False), (needed, True)):
        results = Results("decode", {})
        suites.decode(sides, replace(WORK, kv_tokens=budget), results)  # type: ignore[arg-type]
        found = {side for _, side, _ in results.samples}
        assert ("stock" in found) is stock
        assert {"sepllm", "stock at the compact length"} <= found
        assert ("stock vLLM left out" in capsys.readouterr().err) is not stock


@pytest.mark.parametrize(
    ("spans", "most"),
    [
        ([(0.0, 1.0), (2.0, 3.0)], 1),
        ([(0.0, 2.0), (1.0, 3.0), (1.5, 1.75)], 3),
        ([(0.0, 1.0), (1.0, 2.0)], 1),
    ],
)
def test_overlap_counts_open_spans(spans: list[tuple[float, float]], most: int) -> None:
    assert suites._overlap(spans) == most


def test_prompts_differ_and_have_the_length_asked_for() -> None:
    assert len(WORK.prompt(0, 130)) == 130
    assert WORK.prompt(0, 50) != WORK.prompt(1, 50)
    assert sorted(WORK.prompt(1, 50)) == list(range(50))


def test_a_side_that_answers_otherwise_stops_the_run() -> None:
    gate({"stock": FakeSide(1.0), "sepllm": FakeSide(2.0)}, WORK)  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="answer a short prompt differently"):
        gate({"stock": FakeSide(1.0), "sepllm": FakeSide(1.0, 8)}, WORK)  # type: ignore[dict-item]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_compares_with_stock(name: str) -> None:
    results = Results(name, {})
    sides = {"stock": FakeSide(1.0), "sepllm": FakeSide(2.0)}
    SUITES[name].run(sides, WORK, results)  # type: ignore[arg-type]
    rows = {(row["side"], row["measure"]): row for row in results.rows()}
    timed = [m for _, m in rows if m.endswith(("ttft_s", "per_token_s"))]
    assert rows
    for measure in timed:
        assert rows["sepllm", measure]["over_stock"] == 2.0
    if name in ("concurrency", "overhead"):  # half as fast
        assert rows["sepllm", "output_tokens_per_s"]["over_stock"] == 0.5
    out = StringIO()
    results.write(out)
    for line in out.getvalue().splitlines():
        assert {"versions", "device", "threads", "p20", "p50", "p80"} <= json.loads(line).keys()
    if name == "decode":
        for other in ("stock at the compact length", "stock at 64 tokens"):
            assert rows[other, "time_per_token_s"]["p50"] == 1.0


def test_sides_differ_in_the_backend_alone() -> None:
    stock, ours = (arguments_of(side, "m", {"dtype": "bfloat16"}) for side in ("stock", "sepllm"))
    assert ours == stock | {"attention_backend": "sepllm"}


def test_pages_are_large_unless_the_caller_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert engine_environment()["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert engine_environment()["THP_MEM_ALLOC_ENABLE"] == "0"


def test_server_flags_say_the_same_as_the_arguments() -> None:
    assert server_flags("stock") == []
    assert server_flags("sepllm") == ["--attention-backend", "sepllm"]
    name, text = server_flags("streaming-llm")[-2:]
    given = arguments_of("streaming-llm", "m", {})["additional_config"]
    assert (name, json.loads(text)) == ("--additional-config", given)


@pytest.mark.parametrize(
    ("suite", "given", "reason"),
    [
        ("ttft", {"batches": [4]}, "--batch: this suite sends one request at a time"),
        ("prefix", {"max_tokens": 9}, "--max-tokens: this suite times the first token only"),
        ("decode", {"max_tokens": 1}, "--max-tokens must be 2 or more"),
    ],
)
def test_a_suite_refuses_what_it_does_not_use(
    suite: str, given: dict[str, Any], reason: str
) -> None:
    options = {"lengths": None, "batches": None, "max_tokens": None} | given
    with pytest.raises(ValueError, match=reason):
        SUITES[suite].work([1], rounds=1, **options)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_the_options_of_vllm_sepllm(option: str) -> None:
    done = CliRunner().invoke(command.app, ["run", option])
    assert done.exit_code == 0


def refused(*arguments: object) -> str:
    """What a command says that ends with 2, without the box around it."""
    done = CliRunner().invoke(command.app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("name", [("run", "ttft"), ("serve",)])
def test_mistakes_are_found_before_an_engine_starts(
    name: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer: Any = lambda text: {"input_ids": text.split()}  # noqa: E731
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _model: tokenizer)
    path = tmp_path / "text.txt"
    given = (*name, "--model", "m", "--text")
    assert "cannot read" in refused(*given, path)
    assert "no .txt file in" in refused(*given, tmp_path)
    path.write_text("")
    assert "has 0 tokens, but prompts need" in refused(*given, path)
    path.write_text("a " * 99)
    assert "has 99 tokens, but prompts need 100" in refused(*given, path, "--length", 100)
    path.write_bytes(b"\xff")
    assert "is not UTF-8 text" in refused(*given, path)
    assert "no side 'mine'; there are stock, sepllm" in refused(*given, path, "--side", "mine")


def test_the_outside_report_is_read_with_units() -> None:
    report = {
        "completed": 3,
        "median_ttft_ms": 1500.0,
        "median_tpot_ms": 40.0,
        "median_e2el_ms": 2500.0,
        "output_throughput": 20.0,
        "total_token_throughput": 900.0,
    }
    found = measures(report, 3)
    assert (found["ttft_s"], found["time_per_token_s"]) == (1.5, 0.04)
    with pytest.raises(RuntimeError, match="only 3 of 4"):
        measures(report, 4)


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vllm_sepllm.bench.plot import plot

    results = Results("ttft", {})
    for side in ("stock", "sepllm"):
        for value in (1.0, 2.0):
            results.add("1024 tokens", side, ttft_s=value)
    with (tmp_path / "r.jsonl").open("w") as file:
        results.write(file)
    plot(tmp_path / "r.jsonl", tmp_path / "r.png", "ttft", "ttft_s")
    assert (tmp_path / "r.png").stat().st_size > 1000
