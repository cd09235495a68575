"""An engine whose workers are Ray actors, on CPUs: vLLM's own Ray executor.

vLLM's CPU platform has no Ray resource of its own, so the executor refuses it. Here, and only here,
it is told that its devices are Ray's "GPU"s, in this process and in every Ray worker before vLLM
asks. All else is vLLM's: ``python executor.py JSON`` as engine_process.py, RAY_ADDRESS set.
"""

import ray

from tests.support import engine_process


def name_ray_resource() -> None:
    """Runs first in every Ray worker."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


if __name__ == "__main__":
    name_ray_resource()
    hook = "tests.support.ray_executor.name_ray_resource"
    ray.init(runtime_env={"worker_process_setup_hook": hook})
    engine_process.main()
