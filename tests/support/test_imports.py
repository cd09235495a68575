"""What tests share is in tests/support/: no test file is imported, and no conftest."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def shared_tests(source: str) -> list[str]:
    """Names of test files and of conftests that the source imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [
        name
        for name in names
        if name.startswith("tests.")
        and any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.name))
def test_no_test_file_is_imported(path: Path) -> None:
    assert shared_tests(path.read_text()) == [], "move what is shared to tests/support/"


def test_the_check_sees_every_way_to_import() -> None:
    source = "import tests.a.test_b\nfrom tests.a import test_c\n"
    source += "from tests.support.engine import engine\n"
    source += "def f():\n    from tests.a.conftest import d\n"
    assert shared_tests(source) == ["tests.a.test_b", "tests.a.test_c", "tests.a.conftest.d"]
