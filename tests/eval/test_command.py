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
    (tmp_path / "suite.yaml").write_text(
        """
        tasks:
          - {kind: text, files: [revere.txt], context: [384]}
          - {kind: needle, files: [revere.txt], context: [256], needles: 1, depths: [1]}
          - {kind: cloze, files: [revere.txt], words: 100, passages: 3}
        methods:
          sepllm: {window: 60}
          streaming-llm: {preset: streaming-llm, mean_kv_of: sepllm}
          fixed-interval: {preset: fixed-interval, mean_kv_of: sepllm}
        engine: {dtype: float32, kv_cache_memory_bytes: 67108864}
        """
    )
    command = [sys.executable, "-m", "vllm_sepllm", "eval", str(four_layers_path)]
    command += [str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out")]
    command += ["--data", str(FOLDER)]
    done = subprocess.run(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    names = ["full", "sepllm", "streaming-llm", "fixed-interval"]
    assert [(result["kind"], result["method"]) for result in found] == [
        (kind, name) for kind in ("text", "needle", "scored") for name in names
    ]
    ratios = [result["values"]["ratio"]["mean"] for result in found[1:4]]
    assert all(0.5 < ratio < 2.0 for ratio in ratios)
