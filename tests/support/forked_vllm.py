"""``vllm`` with engine cores and workers that are forked: vLLM's default wherever there are GPUs.

``python -m tests.support.forked_vllm serve MODEL ...``. On CPUs vLLM has them spawned, and that is
what all other tests run.
"""

import os
from typing import Any

# a line of the log for each
FORKED = "forked a process"


def _fork_workers() -> None:
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        update(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[method-assign]
    # programs that are run are none
    os.register_at_fork(after_in_parent=lambda: print(FORKED, flush=True))


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    _fork_workers()
    main()
