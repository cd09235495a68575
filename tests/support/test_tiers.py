"""Runs of slow tests alone leave files out, and never a slow test."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiers import (
    MARKER,
    pytest_collection_modifyitems,
    pytest_ignore_collect,
)


def config(expression: str, *, writes: bool = False) -> Any:
    return SimpleNamespace(option=SimpleNamespace(markexpr=expression, write_compatibility=writes))


@pytest.mark.parametrize(
    ("expression", "name", "is_left_out"),
    [
        ("slow", "test_quick.py", True),
        ("slow", "test_both.py", None),
        ("slow", "quick.py", None),
        ("not slow", "test_quick.py", None),
        ("", "test_quick.py", None),
    ],
)
def test_files_without_a_slow_test_are_left_out(
    tmp_path: Path, expression: str, name: str, is_left_out: bool | None
) -> None:
    path = tmp_path / name
    path.write_text(f"import pytest\n\n@pytest.{MARKER}\n" if "both" in name else "")
    assert pytest_ignore_collect(path, config(expression)) is is_left_out
    # the table has rows of all tests
    assert pytest_ignore_collect(path, config(expression, writes=True)) is None


def test_a_slow_test_that_would_be_left_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_marked_elsewhere.py"
    path.write_text("from elsewhere import costly\n")
    item: Any = SimpleNamespace(path=path, nodeid="it", get_closest_marker=lambda name: name)
    with pytest.raises(pytest.UsageError, match="it is slow, but its file does not say"):
        pytest_collection_modifyitems([item])
    path.with_name("test_own.py").write_text(f"@pytest.{MARKER}\n")
    item.path = path.with_name("test_own.py")
    pytest_collection_modifyitems([item])
