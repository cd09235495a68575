"""``eval`` as a user calls it, up to the engine, which is replaced."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

torch = pytest.importorskip("torch")

from vllm_sepllm.eval.engine import Scores  # noqa: E402
from vllm_sepllm.eval.needle import Needle  # noqa: E402
from vllm_sepllm.eval.text import Excerpt  # noqa: E402


class FakeEngine:
    """Knows nothing."""

    def score(self, token_ids: Any, positions: Any) -> Scores:
        num = len(token_ids) - 1
        return Scores([-1.0] * num, [0] * num, torch.zeros(len(positions), 2))

    def answer(self, prompts: Any, _max_tokens: int) -> list[str]:
        return ["?"] * len(prompts)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    started: list[dict[str, Any]] = []

    @contextmanager
    def running(model: str, settings: Any, **arguments: Any) -> Iterator[FakeEngine]:
        started.append({"model": model, "settings": settings, **arguments})
        yield FakeEngine()

    for item in (Excerpt, Needle):
        monkeypatch.setattr(item, "opened", staticmethod(running))
    return started


def test_nothing_to_evaluate(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    refused = run("eval", tiny_model, "--output", tmp_path / "out", code=2)
    assert "give --text, --gsm8k or --qa" in " ".join(refused.replace("│", " ").split())


def test_a_run_and_the_same_run_again(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path, engines: list[dict[str, Any]]
) -> None:
    output = tmp_path / "out"
    options: list[Any] = ["eval", tiny_model, "--text", text_file, "--output", output]
    options += ["--context", "256", "--needle-context", "300", "--needles", "1", "--depth", "0.5"]
    options += ["--config", '{"window": 60}', "--also", 'w32={"window": 32}']
    options += ["--budget", 'w100={"window": 100}', "--equal", 'none={"separators": []}']
    options += ["--engine-args", '{"dtype": "float32"}']
    text = run(*options)
    assert "| 256 | full | 192 | 100% | 2.72 (2.72 to 2.72) |  |  |  |  |" in text
    assert "| 300 | w32 |" in text
    rows = json.loads((output / "results.json").read_text())["rows"]
    names = ["full", "sepllm", "streaming-llm", "fixed-interval", "none"]
    names += ["w100", "w100-streaming", "w32"]
    assert [row["method"] for row in rows] == names * 2
    kept = {row["method"]: row["kept"] for row in rows if row["suite"] == "text"}
    assert kept["streaming-llm"] == pytest.approx(kept["sepllm"], rel=0.05)
    assert kept["none"] == pytest.approx(kept["sepllm"], rel=0.05)
    assert kept["w100-streaming"] == pytest.approx(kept["w100"], rel=0.05)
    assert kept["fixed-interval"] == pytest.approx(kept["sepllm"], rel=0.05)
    assert kept["w32"] < kept["sepllm"] < kept["full"]
    first = {"model": str(tiny_model), "settings": None, "max_model_len": 300, "dtype": "float32"}
    assert engines[0] == first
    engines.clear()
    assert run(*options).splitlines()[-1] == text.splitlines()[-1]
    assert engines == []
    refused = run(*options, "--positions", "5", code=2)
    assert "another sizes" in refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--context", "64k"), "are wanted; give a longer text"),
        (("--config", '{"windows": 1}'), "unknown key 'windows'"),
        (("--also", "w32"), "must be NAME=JSON"),
        (("--also", "full={}"), "the name full is taken"),
        (("--also", "w={}", "--equal", "w={}"), "the name w is taken"),
        (("--also", "w-streaming={}", "--budget", "w={}"), "the name w-streaming is taken"),
        (("--equal", 'w={"window": 60}'), "--equal chooses the window of w"),
        (("--engine-args", "[]"), "must be a JSON object"),
    ],
)
def test_options_that_are_wrong(
    run: Run,
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    message: str,
) -> None:
    given = ["eval", tiny_model, "--text", text_file, "--output", tmp_path / "out"]
    sizes = () if options[0] == "--context" else ("--context", "256")
    refused = run(*given, *sizes, "--needles", "0", *options, code=2)
    assert message in " ".join(refused.replace("│", " ").split())
