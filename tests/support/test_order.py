"""The order of tests names files that exist."""

from pathlib import Path

from tests.support.order import DEAREST


def test_the_dearest_files_exist() -> None:
    folder = Path(__file__).parents[1]
    assert [name for name in DEAREST if not (folder / name).is_file()] == []
