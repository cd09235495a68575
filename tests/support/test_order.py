"""The order of tests names files that exist."""

from types import SimpleNamespace
from typing import Any

from tests.support.order import DEAREST, TESTS, pytest_collection_modifyitems


def test_the_dearest_files_exist() -> None:
    assert [name for name in DEAREST if not (TESTS / name).is_file()] == []


def test_the_dearest_come_first_and_a_file_keeps_its_order() -> None:
    paths = [TESTS / "test_docs.py", TESTS / DEAREST[1], TESTS / DEAREST[0], TESTS / DEAREST[0]]
    items: list[Any] = [SimpleNamespace(path=p, name=i) for i, p in enumerate(paths)]
    pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [2, 3, 1, 0]
