"""``eval`` with real engines: what was checked before they start is what they start with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sepllm.sample import FOLDER

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def test_a_run_with_engines(four_layers_path: Path, tmp_path: Path) -> None:
    """Proves that checking configurations leaves a process in which vLLM starts its engines."""
    command = [sys.executable, "-m", "vllm_sepllm", "eval", str(four_layers_path)]
    command += ["--text", str(FOLDER / "revere.txt"), "--output", str(tmp_path / "out")]
    command += ["--context", "384", "--needle-context", "256", "--needles", "1", "--depth", "1"]
    arguments = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    command += ["--engine-args", json.dumps(arguments), "--config", '{"window": 60}']
    done = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    names = ["full", "sepllm", "streaming-llm", "fixed-interval"]
    assert [(row["suite"], row["method"]) for row in rows] == [
        (suite, name) for suite in ("text", "needle") for name in names
    ]
    ratios = [row["values"]["ratio"]["mean"] for row in rows[1:4]]
    assert all(0.5 < ratio < 2.0 for ratio in ratios)
