"""Numbers of tests are printed on request, also those of other processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEST = """
def test_something(number):
    number("answer", 42)
"""


def test_numbers_of_other_processes_are_printed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.measured", "--numbers", "-n1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "test_it.py::test_something: answer: 42" in done.stdout
