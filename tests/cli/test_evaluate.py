"""``eval`` as a user calls it, up to the engine, which is replaced."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import SENTENCE, Run

pytest.importorskip("torch")
pytest.importorskip("vllm")

from tests.support.eval_fakes import FakeEngine

TEXT = {"kind": "text", "files": ["text.txt"], "context": [256]}
NEEDLE = {"kind": "needle", "files": ["text.txt"], "context": [300], "needles": 1, "depths": [0.5]}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    started: list[dict[str, Any]] = []

    @contextmanager
    def running(model: str, settings: Any, **arguments: Any) -> Iterator[FakeEngine]:
        started.append({"model": model, "settings": settings, **arguments})
        yield FakeEngine(settings)

    monkeypatch.setattr("vllm_sepllm.eval.engine.running", running)
    return started


def plain(refused: str) -> str:
    """One line, without the box around it."""
    return " ".join(refused.replace("│", " ").split())


Evaluate = Callable[..., str]


@pytest.fixture
def evaluate(run: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> Evaluate:
    """Call ``eval`` with a suite of these tasks, methods and engine arguments."""

    def call(*tasks: dict[str, Any], options: tuple[Any, ...] = (), code: int = 0, **more: Any):
        suite = tmp_path / "suite.yaml"
        # JSON is YAML
        suite.write_text(json.dumps({"tasks": tasks or [TEXT], **more}))
        given = ["eval", tiny_model, suite, "--data", text_file.parent]
        return run(*given, "--output", tmp_path / "out", *options, code=code)

    return call


METHODS = {
    "full": None,
    "sepllm": {"window": 60},
    "streaming-llm": {"preset": "streaming-llm", "mean_kv_of": "sepllm"},
    "fixed-interval": {"preset": "fixed-interval", "mean_kv_of": "sepllm"},
    "none": {"separators": [], "mean_kv_of": "sepllm"},
    "w100": {"window": 100},
    "w100-streaming": {"preset": "streaming-llm", "mean_kv_of": "w100"},
    "w32": {"window": 32},
}


def test_a_run_and_the_same_run_again(
    evaluate: Evaluate, tiny_model: Path, tmp_path: Path, engines: list[dict[str, Any]]
) -> None:
    given: dict[str, Any] = {"methods": METHODS, "engine": {"dtype": "float32"}}
    text = evaluate(TEXT, NEEDLE, **given)
    assert "| 256 | full | 192 | 100% | 2.00 (2.00 to 2.00) |  |  |  |  |" in text
    assert "| 300 | w32 |" in text
    # a log has a line for every engine, and how far the run is
    assert "[eval] " in text
    assert "starting w100: " in text
    assert ": 16 of 16, " in text
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [result["method"] for result in found] == [*METHODS] * 2
    kept = {result["method"]: result["kept"] for result in found if result["kind"] == "text"}
    for name in ("streaming-llm", "fixed-interval", "none"):
        assert kept[name] == pytest.approx(kept["sepllm"], rel=0.05)
    assert kept["w100-streaming"] == pytest.approx(kept["w100"], rel=0.05)
    assert kept["w32"] < kept["sepllm"] < kept["full"]
    first = {"model": str(tiny_model), "settings": None, "max_model_len": 300, "dtype": "float32"}
    assert engines[0] == first
    engines.clear()
    again = evaluate(TEXT, NEEDLE, **given)
    assert again.splitlines()[-1] == text.splitlines()[-1]
    assert engines == []
    refused = plain(evaluate(TEXT | {"positions": 5}, NEEDLE, **given, code=2))
    assert "another tasks of text-256" in refused


def test_without_data_the_files_are_the_bundled_documents(
    run: Run, tiny_model: Path, tmp_path: Path, engines: list[dict[str, Any]]
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"tasks": [{**TEXT, "files": ["revere.txt"]}]}))
    given = ("eval", tiny_model, suite, "--output", tmp_path / "out")
    assert "| 256 | full |" in run(*given)
    assert "cannot read" in plain(run(*given, "--data", tmp_path, code=2))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["run"]["model"] == tiny_model.name


def test_cloze_and_questions_are_asked(
    evaluate: Evaluate, text_file: Path, tmp_path: Path, engines: list[dict[str, Any]]
) -> None:
    text_file.write_text("At noon we saw old Brice and then Brice went home . " * 90)
    line = {"context": "Anna was at home.", "question": "Who was?", "answer": "Anna"}
    (text_file.parent / "q.jsonl").write_text(f"{json.dumps(line)}\n\n" * 4)

    cloze = {"kind": "cloze", "files": ["text.txt"], "words": 40, "passages": 3}
    qa = {"kind": "qa", "file": "q.jsonl", "questions": 2}
    text = evaluate(cloze, qa)
    asked = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {(result["task"], result["num_asked"]) for result in asked} == {("cloze", 3), ("qa", 2)}
    # a half of a nat each token
    assert "| qa | full | 47 | 100% | 100% (34% to 100%) | 1.65 (1.65 to 1.65) |  |  |" in text
    engines.clear()
    evaluate(cloze, qa | {"questions": 4}, options=("--questions", 3))
    # the third question alone is new
    assert len(engines) == 4
    asked = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {(result["task"], result["num_items"]) for result in asked} == {("cloze", 3), ("qa", 3)}


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        (TEXT | {"context": [65536]}, {}, "are wanted, which need 65,534; give a longer text"),
        (TEXT | {"context": [8]}, {}, "context.0: Input should be greater than or equal to 16"),
        (NEEDLE | {"context": [4096]}, {}, "need more text"),
        (NEEDLE | {"context": [16]}, {}, "holds no text"),
        (TEXT | {"files": ["no.txt"]}, {}, "cannot read"),
        (TEXT | {"files": ["text.txt", "./text.txt"]}, {}, "the second file of the name 'text'"),
        (TEXT, {"methods": {"w": {"windows": 1}}}, "unknown key 'windows'"),
        (TEXT, {"methods": {"w": {"full_layers": [0, 4]}}}, "the model has layers -4 to 3"),
        (TEXT, {"methods": {"w": {"full_layers": [0, 1, 2, 3]}}}, "leaves nothing for sepllm"),
        (TEXT, {"methods": {"w": {"separators": ["no such token"]}}}, "no such token"),
        (
            TEXT,
            {"methods": {"w": {"decode_backend": "none"}}},
            "no engine for w: sepllm's decode_backend",
        ),
        (
            TEXT,
            {"engine": {"no_such": 1}},
            "no engine for full: EngineArgs.__init__() got an",
        ),
        (TEXT, {"engine": {"max_model_len": 512}}, "engine must not hold max_model_len: "),
    ],
)
def test_suites_that_are_wrong(
    evaluate: Evaluate,
    engines: list[dict[str, Any]],
    task: dict[str, Any],
    more: dict[str, Any],
    message: str,
) -> None:
    assert message in plain(evaluate(task, **more, code=2))
    assert engines == []


def test_a_context_longer_than_the_model_is_refused(
    evaluate: Evaluate, text_file: Path, engines: list[dict[str, Any]]
) -> None:
    text_file.write_text(SENTENCE * 400)
    refused = plain(evaluate(TEXT | {"context": [4097]}, code=2))
    assert "no engine for full: " in refused
    assert "User-specified max_model_len (4097) is greater" in refused
    assert engines == []


def test_a_refused_run_can_be_corrected(evaluate: Evaluate, engines: list[dict[str, Any]]) -> None:
    evaluate(methods={"w": {"decode_backend": "none"}}, code=2)
    evaluate(methods={"w": {"window": 60}})
    assert engines


def test_a_finished_run_goes_on_with_more(
    evaluate: Evaluate, engines: list[dict[str, Any]]
) -> None:
    evaluate(methods={"sepllm": {"window": 60}})
    engines.clear()
    evaluate(methods={"sepllm": {"window": 60}, "w": {"window": 32}})
    assert [engine["settings"] for engine in engines] == [{"window": 32}]
    refused = plain(evaluate(methods={"sepllm": {"window": 61}}, code=2))
    assert "holds a run with another settings of text-256/sepllm" in refused


def test_another_text_of_the_same_name_is_another_run(
    evaluate: Evaluate,
    text_file: Path,
    engines: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate()
    monkeypatch.setattr("vllm_sepllm.cli.evaluate.installed_version", lambda _name: "0.0")
    assert "a run with another versions;" in plain(evaluate(code=2))
    text_file.write_text(text_file.read_text("utf-8").replace("cat", "dog"), "utf-8")
    assert "a run with another tasks of text-256, versions;" in plain(evaluate(code=2))
    assert engines


def test_sizes_that_are_named_twice_are_measured_once(
    evaluate: Evaluate, tmp_path: Path, engines: list[dict[str, Any]]
) -> None:
    evaluate(TEXT | {"context": [256, 256]}, NEEDLE | {"depths": [0.5, 0.5]})
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {(result["task"], result["num_items"]) for result in found} == {
        ("text-256", 1),
        ("needle-300", 1),
    }
    assert engines


@pytest.mark.parametrize("folder", ["text.txt", "text.txt/out"])
def test_an_output_that_is_no_folder_is_refused(
    evaluate: Evaluate, tmp_path: Path, folder: str
) -> None:
    refused = plain(evaluate(options=("--output", tmp_path / folder), code=2))
    assert "cannot use --output" in refused


def test_a_broken_description_of_a_run_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    assert "run.json is not JSON" in plain(evaluate(code=2))


@pytest.mark.parametrize("kind", ["qa", "lm_eval"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("\n", "holds no question"),
        ("", "is empty"),
        ('{"context": "a", "question": "", "answer": "b"}\n\nno', "line 3 is not JSON"),
        ("[]", "line 1 must be a JSON object"),
        ('{"context": "a", "question": 1}', "it has none for question, answer"),
    ],
)
def test_files_of_questions_are_checked(
    evaluate: Evaluate, text_file: Path, kind: str, text: str | None, message: str
) -> None:
    if kind == "lm_eval":
        pytest.importorskip("lm_eval", reason="an extra")
        if "it has none" in message:
            message = "lm_eval"
    if text is not None:
        (text_file.parent / "q.jsonl").write_text(text)
    assert message in plain(evaluate({"kind": kind, "file": "q.jsonl"}, code=2))


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
    tmp_path: Path,
    command: str,
    config: dict[str, str] | None,
    message: str,
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "suite.yaml").write_text(json.dumps({"tasks": [TEXT]}))
    options: dict[str, tuple[Any, ...]] = {
        "eval": (tmp_path / "suite.yaml", "--output", tmp_path / "out"),
        "plan": ("--kv-memory", "1GiB", "--context", "4k"),
    }
    refused = plain(run(command, tmp_path, *options[command], code=2))
    assert f"of {str(tmp_path)!r}: {message}" in refused.replace(" for ", " of ")
