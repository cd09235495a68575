"""``eval`` as a user calls it, up to the engine, which is replaced."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import SENTENCE, Run

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

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


def plain(refused: str) -> str:
    """One line, without the box around it."""
    return " ".join(refused.replace("│", " ").split())


@pytest.fixture
def small(tiny_model: Path, text_file: Path, tmp_path: Path) -> list[Any]:
    """A call with one excerpt of 256 tokens."""
    given = ["eval", tiny_model, "--text", text_file, "--output", tmp_path / "out"]
    return [*given, "--context", "256", "--needles", "0"]


def test_nothing_to_evaluate(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    refused = run("eval", tiny_model, "--output", tmp_path / "out", code=2)
    assert "give --text, --gsm8k or --qa" in plain(refused)


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
        (("--context", "64k"), "are wanted, which need 65,534; give a longer text"),
        (("--context", "8"), "--context must be 16 or more, got 8"),
        (("--needle-context", "4k", "--needles", "1"), "need more text"),
        (("--needle-context", "16", "--needles", "1"), "holds no text"),
        (("--excerpts", "0"), "nothing to evaluate"),
        (("--config", '{"windows": 1}'), "unknown key 'windows'"),
        (("--also", "w32"), "must be NAME=JSON"),
        (("--also", "full={}"), "the name full is taken"),
        (("--also", "w={}", "--equal", "w={}"), "the name w is taken"),
        (("--also", "w-streaming={}", "--budget", "w={}"), "the name w-streaming is taken"),
        (("--equal", 'w={"window": 60}'), "--equal chooses the window of w"),
        (("--engine-args", "[]"), "must be a JSON object"),
        (("--config", '{"full_layers": [0, 4]}'), "full_layers: the model has layers -4 to 3"),
        (("--also", 'w={"full_layers": [0, 1, 2, 3]}'), "leaves nothing for sepllm"),
        (("--also", 'w={"separators": ["no such token"]}'), "no such token"),
        (("--also", 'w={"decode_backend": "none"}'), "no engine for w: sepllm's decode_backend"),
        (("--engine-args", '{"no_such": 1}'), "no engine for full: EngineArgs.__init__() got an"),
        *(
            (("--engine-args", json.dumps({name: value})), f"must not hold {name}: ")
            for name, value in {
                "model": "other",
                "attention_backend": "sepllm",
                "attention_config": {"backend": "sepllm"},
                "additional_config": {"sepllm": {}},
                "max_model_len": 512,
            }.items()
        ),
    ],
)
def test_options_that_are_wrong(
    run: Run,
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    engines: list[dict[str, Any]],
    options: tuple[str, ...],
    message: str,
) -> None:
    given = ["eval", tiny_model, "--text", text_file, "--output", tmp_path / "out"]
    sizes = () if options[0] == "--context" else ("--context", "256")
    assert message in plain(run(*given, *sizes, "--needles", "0", *options, code=2))
    assert engines == []


def test_a_context_longer_than_the_model_is_refused(
    run: Run, small: list[Any], text_file: Path, engines: list[dict[str, Any]]
) -> None:
    text_file.write_text(SENTENCE * 400)
    refused = plain(run(*small, "--context", "4097", code=2))
    assert "no engine for full: " in refused
    assert "User-specified max_model_len (4097) is greater" in refused
    assert engines == []


def test_a_refused_run_can_be_corrected(
    run: Run, small: list[Any], engines: list[dict[str, Any]]
) -> None:
    run(*small, "--also", 'w={"decode_backend": "none"}', code=2)
    run(*small, "--also", 'w={"window": 60}')
    assert engines


def test_a_finished_run_goes_on_with_more(
    run: Run, small: list[Any], engines: list[dict[str, Any]]
) -> None:
    run(*small, "--config", '{"window": 60}')
    engines.clear()
    run(*small, "--config", '{"window": 60}', "--also", 'w={"window": 32}')
    assert [engine["settings"] for engine in engines] == [{"window": 32}]
    refused = plain(run(*small, "--config", '{"window": 61}', code=2))
    assert "holds a run with another settings of text/256/" in refused


def test_another_text_of_the_same_name_is_another_run(
    run: Run,
    small: list[Any],
    text_file: Path,
    engines: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(*small)
    monkeypatch.setattr("vllm_sepllm.cli.evaluate.installed_version", lambda _name: "0.0")
    assert "a run with another versions;" in plain(run(*small, code=2))
    text_file.write_text(text_file.read_text("utf-8").replace("cat", "dog"), "utf-8")
    assert "a run with another texts, versions;" in plain(run(*small, code=2))
    assert engines


def test_sizes_that_are_named_twice_are_measured_once(
    run: Run, small: list[Any], tmp_path: Path, engines: list[dict[str, Any]]
) -> None:
    twice = ("--needle-context", "300", "--depth", "0.5")
    run(*small, "--context", "256", "--needles", "1", *twice, *twice)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(row["suite"], row["items"]) for row in rows} == {
        ("text", "text-0"),
        ("needle", "0.5-0"),
    }
    assert engines


def test_two_texts_of_one_name_are_refused(run: Run, small: list[Any], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = tmp_path / "b" / "text.md"
    other.write_text("Other. " * 900)
    assert "the second one of the name 'text'" in plain(run(*small, "--text", other, code=2))


@pytest.mark.parametrize("folder", ["text.txt", "text.txt/out"])
def test_an_output_that_is_no_folder_is_refused(
    run: Run, small: list[Any], tmp_path: Path, folder: str
) -> None:
    refused = plain(run(*small, "--output", tmp_path / folder, code=2))
    assert "cannot use --output" in refused


def test_a_broken_description_of_a_run_is_refused(
    run: Run, small: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    assert "run.json is not JSON" in plain(run(*small, code=2))


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--qa", None, "cannot read"),
        ("--qa", "\n", "holds no question"),
        ("--qa", "", "is empty"),
        ("--qa", '{"context": "a", "question": "", "answer": "b"}\n\nno', "line 3 is not JSON"),
        ("--qa", "[]", "line 1 must be an object with texts for context, question, answer"),
        ("--qa", '{"context": "a", "question": 1}', "it has none for question, answer"),
        ("--gsm8k", '{"question": "a"}', "it has none for answer"),
        ("--gsm8k", '{"question": "a", "answer": "b"}\n' * 8, "has 8 questions, but each is asked"),
    ],
)
def test_files_of_questions_are_checked(
    run: Run, tiny_model: Path, tmp_path: Path, option: str, text: str | None, message: str
) -> None:
    if "is asked" in message:
        pytest.importorskip("lm_eval", reason="an extra")
    path = tmp_path / "q.jsonl"
    if text is not None:
        path.write_text(text)
    refused = plain(run("eval", tiny_model, "--output", tmp_path / "out", option, path, code=2))
    assert message in refused


@pytest.mark.parametrize("command", ["eval", "plan"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "sepllm_gpt_neox"}, "it was trained with SepLLM, so its policy is in its"),
        ({"model_type": "mamba"}, "mamba names no attention heads"),
        (None, ""),
    ],
)
def test_models_that_are_refused(
    run: Run,
    text_file: Path,
    tmp_path: Path,
    command: str,
    config: dict[str, str] | None,
    message: str,
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    options: dict[str, tuple[Any, ...]] = {
        "eval": ("--text", text_file, "--output", tmp_path / "out"),
        "plan": ("--kv-memory", "1GiB", "--context", "4k"),
    }
    refused = plain(run(command, tmp_path, *options[command], code=2))
    assert f"of {str(tmp_path)!r}: {message}" in refused.replace(" for ", " of ")
