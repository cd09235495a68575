"""vLLM's configuration on an H100, made on a machine that has none; see ``fake_cuda``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "fake_cuda"
# reads arguments of EngineArgs, prints what they become or why not
CODE = """
import json, sys
from triton.backends import backends

# Model Runner V2 is vLLM's choice where Triton has a device
backends["nvidia"].driver.is_active = staticmethod(lambda: True)
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

load_general_plugins()
assert current_platform.is_cuda() and current_platform.has_device_capability(90)
for line in sys.stdin:
    try:
        made = EngineArgs(**json.loads(line)).create_engine_config()
    except ValueError as error:
        print("REPORT", json.dumps({"refusal": str(error)}))
        continue
    print("REPORT", json.dumps({
        "worker": made.parallel_config.worker_cls,
        "scheduler": made.scheduler_config.scheduler_cls,
        "backend": str(made.attention_config.backend),
        "v2": made.use_v2_model_runner,
        "graphs": made.compilation_config.cudagraph_mode.name,
    }), flush=True)
"""


def configured(cache: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM makes of the arguments, one process for all.

    Its cache is given: with what a run on CPUs left in the user's, vLLM looks at no model.
    """
    path = os.pathsep.join([str(FAKE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input="\n".join(map(json.dumps, jobs)),
        env=os.environ | {"PYTHONPATH": path, "VLLM_CACHE_ROOT": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line.removeprefix("REPORT ")) for line in lines]
