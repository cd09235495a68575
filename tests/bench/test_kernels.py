"""What bench.kernels times is right: its inputs, in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

from vllm_sepllm.bench import kernel_cases
from vllm_sepllm.bench.kernel_cases import Heads, chunk
from vllm_sepllm.policy.visibility import Policy

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU the bench itself checks what it times"
)
HEADS = Heads("tiny", 4, 2, 16)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")


@pytest.mark.parametrize("start", [0, 90])
def test_a_chunk_is_what_the_reference_reads(start) -> None:
    case = chunk(HEADS, start, start + 50, policy=Policy(4, 24), dtype=torch.float32)
    got, wanted = (torch.full_like(case.query, float("nan")) for _ in range(2))
    case.run(got)
    case.run_reference(wanted)
    assert (got - wanted).abs().max() <= 2e-6


def test_flops_of_a_prompt_within_the_window_are_those_of_its_tiles() -> None:
    """Tiles of 16 tokens, two of them: 16 and then 32 keys."""
    case = chunk(HEADS, 0, 32, policy=Policy(4, 64), dtype=torch.float32, tile_tokens=16)
    assert case.flops == 4.0 * (16 * 16 + 16 * 32) * 4 * 16


@pytest.mark.parametrize("module", ["kernels", "tune"])
def test_refuses_to_run_without_a_gpu(module) -> None:
    command = [sys.executable, "-m", f"vllm_sepllm.bench.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"bench.{module} needs a GPU")
