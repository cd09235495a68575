"""Blocks on their way to host memory and back, bit for bit."""

from types import SimpleNamespace

import pytest
import torch

from vllm_sepllm.integration.worker import host_blocks
from vllm_sepllm.integration.worker.host_blocks import HostBlocks
from vllm_sepllm.policy.step.plan import HostTransfers


def test_blocks_come_back_as_they_were() -> None:
    """Layers of several shapes, one of them seen twice, with two kernel blocks to a block."""
    torch.manual_seed(0)
    caches = [torch.randn(12, 2, 4), torch.randn(6, 8).to(torch.bfloat16)]
    before = [cache.clone() for cache in caches]
    host = HostBlocks([*caches, caches[0]], num_blocks=6, num_slots=3)
    host.move(HostTransfers(saves={2: 5, 0: 1}, loads={}))
    for cache in caches:
        cache.zero_()
    # a slot is saved before it is loaded, in one step, too
    caches[1][4] = 7
    host.move(HostTransfers(saves={1: 4}, loads={3: 2, 0: 0, 5: 1}))
    assert torch.equal(caches[0][6:8], before[0][10:12])
    assert torch.equal(caches[0][0:2], before[0][2:4])
    assert torch.equal(caches[1][3], before[1][5])
    assert torch.equal(caches[1][0], before[1][1])
    assert torch.equal(caches[1][5], torch.full((8,), 7, dtype=torch.bfloat16))
    assert not caches[0][2:6].any()


def test_host_memory_of_a_device_is_pinned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own pinned memory is of powers of two: of 3 GiB a layer it would lock 4."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(host_blocks, "pin_tensor", pinned.append)
    cache = torch.randn(12, 2, 4)
    HostBlocks([cache], num_blocks=6, num_slots=3)
    assert not pinned
    # a device whose memory is none: 3 slots of 2 kernel blocks of 2 * 4 float32
    HostBlocks([cache.to("meta")], num_blocks=6, num_slots=3)
    (memory,) = pinned
    assert memory.device.type == "cpu"
    assert memory.untyped_storage().nbytes() == memory.nbytes == 3 * 2 * 2 * 4 * 4


def test_host_memory_is_unpinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory that is freed as it is cannot be pinned by the next engine of the process."""
    pinned: list[int] = []
    monkeypatch.setattr(host_blocks, "pin_tensor", lambda memory: pinned.append(memory.data_ptr()))
    cudart = SimpleNamespace(cudaHostUnregister=pinned.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    host = HostBlocks([torch.randn(6, 8).to("meta")], num_blocks=6, num_slots=3)
    assert len(pinned) == 1
    host.release()
    host.unpin()
    host.unpin()
    assert not pinned
    host = HostBlocks([torch.randn(6, 8)], num_blocks=6, num_slots=3)
    host.release()
    host.unpin()
