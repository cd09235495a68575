"""A run of slow tests alone imports the files that have some (a pytest plugin, see conftest.py).

Each process imports every file that it collects, and three of four have quick tests alone.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

MARKER = "mark.slow"


@cache
def names_the_marker(path: Path) -> bool:
    """Whether a slow test may be in the file."""
    return MARKER in path.read_text("utf-8")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a file out; None: it is for others to say."""
    is_test = collection_path.match("test_*.py")
    is_slow_tier = config.option.markexpr == "slow" and not config.option.write_compatibility
    is_needless = is_slow_tier and is_test and not names_the_marker(collection_path)
    return True if is_needless else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Runs of all files make sure that no slow test would be left out."""
    for item in items:
        if item.get_closest_marker("slow") and not names_the_marker(item.path):
            raise pytest.UsageError(
                f"{item.nodeid} is slow, but its file does not say `{MARKER}`, so that "
                "`pytest -m slow` would not collect it: write the marker into the file"
            )
