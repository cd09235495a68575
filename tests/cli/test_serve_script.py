"""``examples/serve.sh`` adds the selection to a command line and takes nothing from it."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve.sh"


def test_settings_of_the_user_are_the_only_ones(tmp_path: Path) -> None:
    """``vllm`` is replaced by a program that prints what it is called with."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    settings = '{"sepllm": {"window": 508}}'
    done = subprocess.run(
        [SCRIPT, "M", "--additional-config", settings],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words == [
        *("serve", "M", "--additional-config", settings),
        *("--attention-backend", "sepllm"),
    ]
