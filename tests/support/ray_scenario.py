"""Ray work on a cluster of two nodes, in a network namespace with nothing but lo in it.

``python -m tests.support.ray_scenario JOB.json`` runs inside the namespace (test_ray.py makes it).
Whatever Ray started ends with the namespace's first process, which is this one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
NODE = {"node_ip_address": LOOPBACK, "object_store_memory": 100 << 20}
# inherited by every process of Ray's
ENVIRONMENT = {
    "VLLM_HOST_IP": LOOPBACK,
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # the examples compile, which is not what is tested here
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def cluster(folder: str) -> Iterator[str]:
    """The address of two nodes. The first has what Ray calls GPUs, two of them."""
    # Cluster writes its address below this even if the nodes have a folder of their own
    os.environ["RAY_TMPDIR"] = folder
    own = Path(folder) / "ray"
    own.mkdir()
    head = {"num_cpus": 1, "num_gpus": 2, "include_dashboard": False, "temp_dir": str(own)}
    nodes = Cluster(initialize_head=True, head_node_args=NODE | head)
    nodes.add_node(num_cpus=2, **NODE)
    try:
        yield nodes.address
    finally:
        nodes.shutdown()


def engines() -> list[psutil.Process]:
    """Processes of the actors that hold an engine; Ray names them after what they do."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::Engine" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def pool_with_a_killed_engine(command: list[str], files: list[str]) -> dict[str, Any]:
    """Run the example; once it has answered the first file, kill one of its engines at work."""
    answers: list[tuple[str, str]] = []
    before: set[int] = set()
    seen: set[int] = set()
    victim = None
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as example:
        assert example.stdout is not None
        for line in example.stdout:
            file, _, answer = line.rstrip("\n").partition(": ")
            if file not in files:  # Ray shows what the actors write, too
                continue
            answers.append((file, answer))
            if victim is None:
                before = {process.pid for process in engines()}
                victim = engine_at_work()
                victim.kill()
            seen |= {process.pid for process in engines()}
    return {
        "returncode": example.returncode,
        "answers": answers,
        "victim": victim.pid if victim else None,
        "engines_before": sorted(before),
        "engines_seen": sorted(seen),
    }


def engine_at_work() -> psutil.Process:
    """One that answers at this moment."""
    while True:
        for process in engines():
            if "continuation" in " ".join(process.cmdline()):
                return process
        time.sleep(0.01)


def run(command: list[str], **variables: str) -> dict[str, Any]:
    """Run one of our scripts to its end."""
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    return {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr[-20000:]}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """What came out of each part, with the seconds it took."""
    os.environ.update(ENVIRONMENT)
    report: dict[str, Any] = {}
    with cluster(job["folder"]) as os.environ["RAY_ADDRESS"]:
        for name, part in job["parts"].items():
            start = time.monotonic()
            if name == "pool":
                report[name] = pool_with_a_killed_engine(part["command"], part["files"])
            else:
                report[name] = run(part["command"], **part.get("environment", {}))
            report[name]["seconds"] = time.monotonic() - start
    return report


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".report").write_text(json.dumps(main(json.loads(path.read_text()))))
