"""The command as a whole."""

import subprocess
import sys

from tests.support.command_line import Run
from vllm_sepllm import __version__


def test_version_and_subcommands(run: Run) -> None:
    assert run("--version") == f"vllm-sepllm {__version__}\n"
    text = run("--help")
    # a command a line, behind the border
    listed = {line.split()[1] for line in text.splitlines() if len(line.split()) > 2}
    assert {"doctor", "separators", "plan", "show", "eval"} <= listed


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "vllm_sepllm", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"vllm-sepllm {__version__}\n"
