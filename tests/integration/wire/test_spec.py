"""The spec is known to vLLM in every process, its manager's module only where one is made."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.policy.visibility import Policy

ROOT = Path(__file__).resolve().parents[3]
FULL = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
WORKER = """
import pickle, sys
import vllm_sepllm.integration.worker.cpu.worker, vllm_sepllm.integration.worker.gpu.worker
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
spec = pickle.loads(bytes.fromhex(sys.argv[1]))
KVCacheSpecRegistry.check_kv_cache_spec_registry({"layer": spec})
print(*sorted(name for name in sys.modules if name.startswith("vllm_sepllm.integration.")))
"""


def test_a_worker_has_the_spec_and_loads_nothing_of_the_scheduler() -> None:
    """vLLM's model runner looks the specs of its layers up in the registry."""
    spec = SepLLMSpec.from_full_attention(FULL, Policy(4, 60, 100))
    command = [sys.executable, "-c", WORKER, pickle.dumps(spec).hex()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    folders = {name.split(".")[2] for name in done.stdout.splitlines()[-1].split()}
    assert {"wire", "worker"} <= folders
    assert not {"scheduler", "frontend"} & folders


def test_what_vllm_reads_of_the_registered_class_is_true_of_the_manager() -> None:
    """Besides its name, which a warning about Mamba layers shows: partial_hash_hits_enabled."""
    registered = KVCacheSpecRegistry.get_manager_class(
        SepLLMSpec.from_full_attention(FULL, Policy(4, 60, 100))
    )
    name = "supports_fine_grained_hash_lookup"
    assert getattr(registered, name) == getattr(SepLLMManager, name)
