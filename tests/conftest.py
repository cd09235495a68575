"""Environment that all tests share; their fixtures are in tests/support/."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# asserts of helpers, too, show their values
pytest.register_assert_rewrite("tests.support")
pytest_plugins = [
    "tests.support.command_line",
    "tests.support.compatibility",
    "tests.support.model_folders",
    "tests.support.measured",
    "tests.support.order",
    "tests.support.tiers",
    "tests.support.vllm_log",
]

# what tests import lives as long as they do: less of the time goes into looking for garbage there
gc.set_threshold(100_000, 10, 10)
# child processes have it, too, and more: see its sitecustomize.py
CHILDREN = str(Path(__file__).parent / "support" / "children")
if CHILDREN not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    path = [CHILDREN, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
# before anything imports vllm, transformers or triton; child processes inherit them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# each process of an engine's own imports vLLM for nine seconds; e2e/test_engines.py, test_server.py
# and test_parallel.py have them all
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# inductor compiles vLLM's sampler for five seconds in each process, eager or not; engines that are
# to be compiled are, see support/engine.py
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# read when torch loads OpenMP: threads that spin for each other take ten times as long beside a
# busy neighbour, so they sleep
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# read by torch, too: with small pages a fifth of the oracle's time goes into getting them
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # vLLM would start a thread a core in every engine, whatever OMP_NUM_THREADS says
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))

if find_spec("torch"):
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton.jit decorates a kernel

# wall-clock limits say more about the machine than about the code; with CI set, hypothesis loads
# a profile of its own that has none either and draws the same examples every time
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# a night's search: pytest --hypothesis-profile=long
settings.register_profile("long", settings.get_profile("local"), max_examples=4000)
if "CI" not in os.environ:
    settings.load_profile("local")
