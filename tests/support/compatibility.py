"""The table of docs/compatibility.md, made of test results (a pytest plugin, see conftest.py).

A test says what its passing means: ``@pytest.mark.compatibility(feature, outcome)``. A run with
``--write-compatibility`` writes the rows of its tests, if all of them passed; make it a run of all
tests. tests/support/test_compatibility.py keeps the file and the markers the same.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PATH = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
REFUSED = "refused: "
PROPERTY = "compatibility"

_HEAD = """\
# What works with sepllm, and what is refused

Written by `python -m pytest --write-compatibility` from the results of the tests: no row without a
test that passed on vLLM 0.32 for CPUs; what each test does is told once, [below](#the-tests). What
is refused is refused at start-up, with the sentence of which the table has the reason and the
remedy. Nothing here ran on a GPU, nor on vLLM 0.33:
[upgrading-vllm.md](upgrading-vllm.md#what-ran-on-which-version) has what did.
"""


class Row(NamedTuple):
    """One line of the table."""

    feature: str
    outcome: str
    test: str
    how: str


ROWS = pytest.StashKey[list[Row]]()
_FINISHED = pytest.StashKey[dict[Row, str]]()
_NOT_WRITTEN = pytest.StashKey[str]()


def refused(feature: str, what: str, remedy: str) -> pytest.MarkDecorator:
    """The marker of a test whose subject is refused with ``what`` ... ``remedy``."""
    return pytest.mark.compatibility(feature, f"{REFUSED}“{what} … {remedy}”")


def exact(case: Any) -> Any:
    """A case as one of a test's parameters; its ``feature`` is the row that it proves, if any."""
    row = pytest.mark.compatibility(case.feature, "exact")
    return pytest.param(case, id=case.name, marks=row if case.feature else ())


def render(rows: Iterable[Row]) -> str:
    """The file's text."""
    ordered = sorted(set(rows))
    works = [row for row in ordered if not row.outcome.startswith(REFUSED)]
    tables = [
        ("Works", works),
        ("Refused", [row for row in ordered if row not in works]),
    ]
    text = _HEAD
    for title, part in tables:
        text += f"\n## {title}\n\n| feature | outcome | test |\n| --- | --- | --- |\n"
        for row in part:
            name = f"`{row.test.rpartition('::')[2]}`"
            cells = (row.feature, row.outcome.removeprefix(REFUSED), name)
            text += f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    text += "\n## The tests\n\n"
    for test, how in sorted({(row.test, row.how) for row in ordered}):
        text += f"- `{test}`" + (f": {how}" if how else "") + "\n"
    return text


def rows_of(item: pytest.Item) -> list[Row]:
    """What the test's markers and docstring say."""
    test: Any = item
    paragraph = (inspect.getdoc(test.function) or "").partition("\n\n")[0]
    how = " ".join(paragraph.split())
    name = item.nodeid.partition("[")[0]
    return [Row(*marker.args, name, how) for marker in item.iter_markers("compatibility")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-compatibility", action="store_true", help=f"write {PATH.name}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compatibility(feature, outcome): a row of the table")
    config.stash[ROWS] = []
    config.stash[_FINISHED] = {}


@pytest.hookimpl(tryfirst=True)  # before -m and -k take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for row in rows_of(item):
            config.stash[ROWS].append(row)
            # with xdist, results reach the process that writes in reports alone, as plain lists
            item.user_properties.append((PROPERTY, list(row)))


class Results:
    """Gathers outcomes where all reports arrive."""

    def __init__(self, finished: dict[Row, str]) -> None:
        self._finished = finished

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, row in report.user_properties:
            is_news = report.when == "call" or report.outcome != "passed"
            # a row may have several tests: one that does not pass spoils it
            if name == PROPERTY and is_news and self._finished.get(Row(*row)) in (None, "passed"):
                self._finished[Row(*row)] = report.outcome


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(Results(session.config.stash[_FINISHED]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not config.getoption("--write-compatibility") or hasattr(config, "workerinput"):
        return
    finished = config.stash[_FINISHED]
    wrong = {row.test for row, outcome in finished.items() if outcome != "passed"}
    missing = {row.test for row in set(config.stash[ROWS]) - set(finished)}
    if not wrong and not missing:
        PATH.write_text(render(finished))
        return
    # told behind the reports of the tests, which an exception here would swallow
    config.stash[_NOT_WRITTEN] = f"did not pass: {sorted(wrong)}, did not run: {sorted(missing)}"
    session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _NOT_WRITTEN in config.stash:
        terminalreporter.write_line(f"ERROR: {PATH.name} not written: {config.stash[_NOT_WRITTEN]}")
