"""The command as a whole."""

import subprocess
import sys

from tests.support.command_line import Run
from vllm_sepllm import __version__


def test_version_and_subcommands(run: Run) -> None:
    assert run("--version") == f"vllm-sepllm {__version__}\n"
    text = run("--help")
    for name in ("doctor", "separators", "plan", "show"):
        assert name in text


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "vllm_sepllm", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"vllm-sepllm {__version__}\n"
