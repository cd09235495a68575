"""Every code block of README.md and its kind does what it says, and what they name exists.

Python runs (an engine's programs are compiled), JSON is a valid configuration, and each command
line is one that the program would take.
"""

import ast
import json
import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, SepLLMConfig

typer = pytest.importorskip("typer")

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# not ours: nothing to check them with
FOREIGN = {"awk", "ray", "pip", "git", "cd", "curl", "docker", "unzip", "cat"}
# where documents count paths from, beside the root
FOLDERS = (".", "docs", "examples", "vllm_sepllm", "vllm_sepllm/integration")
KINDS = {"python", "json", "text", "html", "yaml", "", "sh", "bash"}
# files with what is refused, at start-up or of a request: docs/troubleshooting.md has all of it
REFUSING = (
    "integration/startup/connectors.py",
    "integration/startup/refusals.py",
    "integration/worker/layers.py",
    "integration/frontend/request_bodies.py",
    "integration/wire/choices.py",
    "policy/choice.py",
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: str
    line: int
    kind: str
    body: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        body = re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(document.name, line, match[2], body))
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def of_kind(*kinds: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind in kinds]


def check_config(given: object) -> None:
    assert isinstance(given, dict)
    assert set(given) == {ADDITIONAL_CONFIG_KEY}
    SepLLMConfig.from_additional_config(given)


def commands(body: str) -> list[list[str]]:
    """Words of each command, without comments and variables set for it."""
    joined = body.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and words[0] != "export":
            found.append(words)
    return found


def check_command(words: list[str]) -> None:
    program, arguments = Path(words[0]).name, words[1:]
    if program in FOREIGN:
        return
    if program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {a for a in arguments if "=" not in a} <= set(targets)
    elif program == "vllm-sepllm":
        check_ours(arguments)
    elif program == "vllm":
        assert arguments[0] in ("serve", "bench")
        check_additional_config(arguments)
    elif program == "pytest" or arguments[:2] == ["-m", "pytest"]:
        for path in arguments:
            if "/" in path or ".py" in path:
                check_path(path)
    elif program.startswith("python"):
        check_python(arguments)
    else:
        path = words[0]
        assert (ROOT / path).exists(), f"unknown command {path}: teach tests/test_docs.py"


def check_path(path: str, *folders: str) -> None:
    """``FILE``, ``FOLDER/``, ``FILE::NAME`` or a pattern, from the root or one of ``folders``."""
    name, _, defined = path.partition("::")
    found = [file for folder in (".", *folders) for file in (ROOT / folder).glob(name.rstrip("/"))]
    assert found, f"{path} does not exist"
    if defined:
        definition = rf"^ *(def|class) {defined.partition('[')[0]}\b"
        text = found[0].read_text("utf-8")
        assert re.search(definition, text, re.MULTILINE), f"{path} does not exist"


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m" and arguments[1] == "vllm_sepllm":
        check_ours(arguments[2:])
    elif arguments[:2] == ["-m", "pip"]:
        pass  # looking for it makes setuptools hand out the standard library's distutils
    elif arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None, arguments[1]
    else:
        assert (ROOT / arguments[0]).exists(), arguments[0]


def check_ours(arguments: list[str]) -> None:
    """As the command line reads it, without running it."""
    from vllm_sepllm.cli.app import app

    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    context = command.make_context(arguments[0], list(arguments[1:]))
    if "config" in context.params:
        settings = json.loads(context.params["config"])
        SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: settings})
    suite = context.params.get("suite")
    if suite is not None and suite.name != "SUITE.yaml":
        from vllm_sepllm.eval.suite_file import read_suite

        read_suite(ROOT / suite)


def check_additional_config(arguments: list[str]) -> None:
    for name, value in pairwise(arguments):
        if name == "--additional-config":
            check_config(json.loads(value))


def test_every_kind_of_block_is_checked() -> None:
    assert {block.kind for block in BLOCKS} <= KINDS
    assert len(BLOCKS) > 10


@pytest.mark.parametrize("block", of_kind("python"), ids=str)
def test_python(block: Block) -> None:
    code = compile(block.body, str(block), "exec")
    for node in ast.walk(ast.parse(block.body)):
        if isinstance(node, ast.keyword) and node.arg == "additional_config":
            check_config(ast.literal_eval(node.value))
    # a program with an engine is run by tests/examples and the slow tier
    if not re.search(r"import (LLM|openai|lm_eval)|from openai", block.body):
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("block", of_kind("json"), ids=str)
def test_json(block: Block) -> None:
    given = json.loads(block.body)
    if ADDITIONAL_CONFIG_KEY in given:
        check_config(given)


@pytest.mark.parametrize("block", of_kind("", "sh", "bash"), ids=str)
def test_commands(block: Block) -> None:
    found = commands(block.body)
    assert found
    for words in found:
        check_command(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_inline_settings_and_commands(document: Path) -> None:
    text = _FENCE.sub("", document.read_text("utf-8"))
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        if "..." in code:
            continue
        if "--additional-config '" in code:
            check_additional_config(shlex.split(code))
        elif (
            (words[0] == "make" and len(words) > 1 and words[1].islower())
            or words[0] == "pytest"
            or words[:2] == ["python", "-m"]
            or (words[0] == "vllm-sepllm" and len(words) > 2)
        ):
            check_command(shlex.split(code))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """Paths that begin with something of ours, and every source file."""
    tops = {path.name for folder in FOLDERS for path in (ROOT / folder).iterdir()}
    for code in re.findall(r"`([^`\n]+)`", _FENCE.sub("", document.read_text("utf-8"))):
        for word in code.split():
            is_path = re.fullmatch(r"[\w.*-]+/[\w./*-]*(::[\w\[\] -]+)?", word)
            if is_path and (word.partition("/")[0] in tops or word.endswith((".py", ".md", ".sh"))):
                check_path(word, *FOLDERS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text("utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def headings(document: Path) -> set[str]:
    """Names that links give to the headings of a document."""
    found = re.findall(r"^#+ (.*)$", _FENCE.sub("", document.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_name_headings_that_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text("utf-8"))
    for target, heading in links:
        named = document.parent / target if target else document
        assert heading in headings(named), f"{target}#{heading}"


def messages(source: Path) -> list[str]:
    """Texts in the code of a file, docstrings aside, with … for what varies."""
    nodes = list(ast.walk(ast.parse(source.read_text("utf-8"))))
    parts = [part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values]
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    ours = {id(node) for node in (*parts, *docstrings)}
    found = []
    for node in nodes:
        pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
        if id(node) in ours or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        texts = [piece.value if isinstance(piece, ast.Constant) else "…" for piece in pieces]
        if all(isinstance(text, str) for text in texts):
            found.append(re.sub(r"%[sd]", "…", "".join(texts)))
    return found


def is_in(quote: str, message: str) -> bool:
    """Whether the parts of a quotation stand in a message, in their order."""
    return re.search(".*".join(map(re.escape, quote.split("…"))), message, re.DOTALL) is not None


def quotes() -> list[str]:
    """What docs/troubleshooting.md says that a program prints."""
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    return [" ".join(quote.split()) for quote in re.findall(r"“([^”]+)”", text)]


def test_messages_that_are_quoted_are_in_the_code() -> None:
    said = [text for path in (ROOT / "vllm_sepllm").rglob("*.py") for text in messages(path)]
    unknown = [q for q in quotes() if not any(is_in(q, message) for message in said)]
    assert len(quotes()) > 50
    assert unknown == []


@pytest.mark.parametrize("source", REFUSING)
def test_every_refusal_is_explained(source: str) -> None:
    said = [text for text in messages(ROOT / "vllm_sepllm" / source) if len(text.split()) > 6]
    assert said
    given = [quote for quote in quotes() if len(quote.split()) > 4]
    assert [text for text in said if not any(is_in(quote, text) for quote in given)] == []


@pytest.mark.parametrize(
    ("document", "most"), [("README.md", 150), ("CONTRIBUTING.md", 90), ("CHANGELOG.md", 70)]
)
def test_front_pages_are_short(document: str, most: int) -> None:
    assert len((ROOT / document).read_text("utf-8").splitlines()) <= most


@pytest.mark.parametrize(
    "path",
    ["tests/no_test.py", "worker/no_file.py", "wire/plan.py::attach", "wire/plan.py::StepPlan"],
)
def test_the_check_of_paths_sees_mistakes(path: str) -> None:
    with pytest.raises(AssertionError, match=f"{path} does not exist"):
        check_path(path, *FOLDERS)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("make no-such-target", AssertionError),
        ("vllm-sepllm plan MODEL --kv-memory much", typer.BadParameter),
        ("vllm-sepllm eval MODEL examples/eval/no-such.yaml --output o", ValueError),
        ('vllm serve M --additional-config \'{"sepllm": {"windows": 1}}\'', ValueError),
        ("pytest tests/no_such_test.py", AssertionError),
        ("pytest -m slow tests/no_such_folder/", AssertionError),
        ("pytest tests/test_docs.py::test_no_such_thing", AssertionError),
        ("python -m vllm_sepllm.no_such_module", AssertionError),
        ("no-such-program", AssertionError),
    ],
)
def test_the_checks_see_mistakes(command: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_command(shlex.split(command))
