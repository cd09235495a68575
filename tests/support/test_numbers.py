"""Numbers of tests are printed on request, also those of other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = """
def test_something(number):
    number("answer", 42)
"""


@pytest.mark.parametrize("processes", ["0", "1"])
def test_numbers_are_printed_on_request(processes: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.numbers", "-n", processes]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    silent, told = (
        subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True
        ).stdout
        for more in ((), ("--numbers",))
    )
    assert "1 passed" in silent
    assert "answer" not in silent
    assert "test_it.py::test_something: answer: 42" in told
