"""A suite file says everything that a run measures, and what is wrong in it is named."""

from pathlib import Path

import pytest

from vllm_sepllm.eval.methods import DEFAULTS, Method
from vllm_sepllm.eval.suite_file import read_suite
from vllm_sepllm.sample import FOLDER

TEXT = "tasks: [{kind: text, files: [a.txt], context: [64]}]\n"
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples/eval").glob("*.yaml"))


def read(folder: Path, content: str):
    path = folder / "suite.yaml"
    path.write_text(content)
    return read_suite(path)


def test_a_suite(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        """
        tasks:
          - {kind: text, files: [a.txt], context: [64, 128]}
          - {kind: needle, name: few, files: [a.txt], context: [64], needles: 1, depths: [0, 0.5]}
        methods:
          sepllm: {window: 60}
          plain: {preset: streaming-llm, mean_kv_of: sepllm}
          every: {preset: fixed-interval, mean_kv_of: sepllm}
          full: null
        engine: {dtype: float32}
        """,
    )
    assert [(task.kind, task.name) for task in suite.tasks] == [("text", "text"), ("needle", "few")]
    assert suite.compared == [
        Method("full", None),
        Method("sepllm", {"window": 60}),
        Method("plain", {"preset": "streaming-llm"}, "sepllm"),
        Method("every", {"preset": "fixed-interval"}, "sepllm"),
    ]
    assert suite.engine == {"dtype": "float32"}


def test_without_methods_a_suite_compares_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT).compared == list(DEFAULTS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_suites_of_the_documents_are_valid(path: Path) -> None:
    suite = read_suite(path)
    assert suite.compared[0] == Method("full", None)


def test_the_suite_of_the_sample_needs_no_other_files() -> None:
    (path,) = (path for path in EXAMPLES if path.name == "sample.yaml")
    for task in read_suite(path).tasks:
        for file in task.files:
            # a token of a book is at least three characters
            assert len((FOLDER / file).read_text("utf-8")) > 3 * max(task.context)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not YAML"),
        ("[]", "valid dictionary"),
        ("{}", "tasks: Field required"),
        ("tasks: []", "tasks: List should have at least 1 item"),
        ("tasks: [{kind: texts}]", "tasks.0: Input tag 'texts'"),
        ("tasks: [{kind: text, files: [a], context: [8]}]", "context.0: .* equal to 16"),
        ("tasks: [{kind: text, files: [a], context: [64], depths: [0]}]", "text.depths: Extra"),
        ("tasks: [{kind: text, files: [a], context: ['64']}]", "context.0: .* valid integer"),
        ("tasks: [{kind: needle, files: [a], context: [64], depths: [2]}]", "depths.0: "),
        ("tasks: [{kind: qa, file: a, name: a/b}]", "a name is of letters, digits"),
        ("tasks: [{kind: qa, file: a}, {kind: qa, file: b}]", r"got \['qa'\] twice"),
        (TEXT + "methods: {full: {}}", "write full: null"),
        (TEXT + "methods: {w: null}", "w has no settings"),
        (TEXT + "methods: {w: {windows: 1}}", "method w: .* unknown key 'windows'"),
        (TEXT + "methods: {'a b': {}}", "got 'a b'"),
        (TEXT + "methods: {w: {mean_kv_of: v}}", "must name another method, got v"),
        (TEXT + "methods: {full: null, w: {mean_kv_of: full}}", "must name another method"),
        (TEXT + "methods: {v: {}, w: {mean_kv_of: v, window: 60}}", "leave it out"),
        (
            TEXT + "methods: {u: {}, v: {mean_kv_of: u}, w: {mean_kv_of: v}}",
            "the window of v is chosen itself",
        ),
        *(
            (TEXT + f"engine: {{{key}: 1}}", f"engine must not hold {key}: ")
            for key in (
                "model",
                "attention_backend",
                "attention_config",
                "additional_config",
                "max_model_len",
            )
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*no\.yaml"):
        read_suite(tmp_path / "no.yaml")
