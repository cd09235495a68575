"""A short soak run (vllm_sepllm/bench/soak/__main__.py); a longer one is for people."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.compatibility("A line in vLLM's log", "what is kept")
def test_a_server_survives_random_traffic(four_layers_path: Path) -> None:
    """Proves, over a served engine with a pool smaller than a burst: no fault, no lost or wrong
    answer (each against its replay from scratch), no block held whenever nothing runs, a prefix
    cache that still finds what it should, and a line in the log of what is kept."""
    command = [sys.executable, "-m", "vllm_sepllm.bench.soak", "--model", str(four_layers_path)]
    done = subprocess.run(
        [*command, "--minutes", "0.3", "--seed", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"VLLM_LOG_STATS_INTERVAL": "0.5"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["sent"]) == 8, "each kind of request"
    assert report["replayed"] >= 15  # a burst is twelve
    assert report["answered"] >= 2 * report["replayed"] > 0
    assert report["most_at_once"] >= 12
    assert report["num_cached_tokens"] > 0
    assert (report["lost"], report["free_blocks"]) == (0, report["num_blocks"])
    assert report["near_ties"] <= report["replayed"] / 10
    (log,) = re.findall(r"the server's log is (\S+)", done.stdout)
    assert re.search(
        r"SepLLM: kept [\d.k]+ of [\d.k]+ tokens \(\d+%\), \d+ blocks", Path(log).read_text()
    )
