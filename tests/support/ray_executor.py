"""Engines whose workers are Ray actors, on CPUs: vLLM's own Ray executor.

vLLM's CPU platform has no Ray resource of its own, so the executor refuses it. Here, and only here,
it is told that its devices are Ray's "GPU"s, in this process and in every Ray worker before vLLM
asks. All else is vLLM's: ``python -m tests.support.ray_executor JSON``, RAY_ADDRESS set, with a
list of jobs as of engine_process.py, each with the "environment" in which its engine starts.
"""

import json
import os
import sys

import ray

from tests.support import engine_process


def name_ray_resource() -> None:
    """Runs first in every Ray worker."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def main() -> None:
    """A report a job; the engine of the job before has ended by then."""
    from vllm.distributed import cleanup_dist_env_and_memory

    hook = "tests.support.ray_executor.name_ray_resource"
    for job in json.loads(sys.argv[1]):
        os.environ.update(job["environment"])
        # an engine's placement group lives as long as its Ray job
        ray.init(runtime_env={"worker_process_setup_hook": hook})
        engine_process.print_report(job)
        cleanup_dist_env_and_memory()
        ray.shutdown()


if __name__ == "__main__":
    name_ray_resource()
    main()
