"""Numbers that tests measure beside what they prove (a pytest plugin, see conftest.py).

A test says ``number(name, value)``; a run with ``--numbers`` prints them all behind its results.
"""

from collections.abc import Callable

import pytest

PROPERTY = "number"
Number = Callable[[str, object], None]


@pytest.fixture
def number(request: pytest.FixtureRequest) -> Number:
    """Takes a name and a value for the table."""

    def keep(name: str, value: object) -> None:
        # with xdist, they reach the process that prints in reports alone
        request.node.user_properties.append((PROPERTY, f"{name}: {value}"))

    return keep


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--numbers", action="store_true", help="print the numbers that tests measured")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.getoption("--numbers"):
        return
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    terminalreporter.section("numbers")
    for report in reports:
        for name, line in report.user_properties if report.when == "call" else ():
            if name == PROPERTY:
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {line}")
