"""docs/compatibility.md is what the tests say."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.compatibility import PATH, PROPERTY, ROWS, Results, Row, render


def test_the_table_is_the_markers(request: pytest.FixtureRequest) -> None:
    """All of it if all tests were collected, else the rows of those that were."""
    if request.config.getoption("--write-compatibility"):
        return  # it becomes so behind the last test
    rows = request.config.stash[ROWS]
    written = PATH.read_text()
    root = request.config.rootpath
    is_whole = [root / name for name in request.config.args] == [root / "tests"]
    remedy = "run all tests with --write-compatibility"
    if is_whole:
        assert written == render(rows), remedy
    missing = set(render(rows).splitlines()) - set(written.splitlines())
    assert not missing, remedy


def test_rows_with_bars_two_outcomes_of_a_feature_and_two_features_of_a_test() -> None:
    rows = [
        Row("a|b", "works", "tests/x.py::y", "Proves it."),
        Row("c", "works", "tests/x.py::y", "Proves it."),
        Row("a|b", "refused: “no … yes”", "tests/x.py::z", ""),
    ]
    works, rest = render(rows).split("## Refused")
    refused, tests = rest.split("## The tests")
    assert r"| a\|b | works | `y` |" in works
    assert "| c | works | `y` |" in works
    assert r"| a\|b | “no … yes” | `z` |" in refused
    assert tests.split("\n") == ["", "", "- `tests/x.py::y`: Proves it.", "- `tests/x.py::z`", ""]


def test_a_test_that_does_not_pass_spoils_its_row() -> None:
    row = Row("feature", "works", "tests/x.py::y", "")
    finished: dict[Row, str] = {}

    def report(when: str, outcome: str) -> Any:
        properties = [(PROPERTY, list(row))]
        return SimpleNamespace(when=when, outcome=outcome, user_properties=properties)

    results = Results(finished)
    results.pytest_runtest_logreport(report("setup", "passed"))
    assert finished == {}
    for outcome in ("passed", "failed", "passed"):
        results.pytest_runtest_logreport(report("call", outcome))
    assert finished == {row: "failed"}
    finished.clear()
    results.pytest_runtest_logreport(report("setup", "skipped"))
    assert finished == {row: "skipped"}
