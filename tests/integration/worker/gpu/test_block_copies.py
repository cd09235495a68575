"""Copies of blocks before a step: right, and through little memory however many they are."""

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import vllm.v1.worker.gpu.model_runner as runner_v2
import vllm.v1.worker.gpu_model_runner as runner_v1
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from vllm_sepllm.integration.worker.gpu import block_copies

NUM_BLOCKS, NUM_LAYERS, PAGE = 64, 3, 2 * 4 * 16
FLOAT = 4


class Largest(TorchDispatchMode):
    """Remembers the most bytes that an operation gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and func.overloadpacket is torch.ops.aten.index:
            self.bytes = max(self.bytes, made.nbytes)
        return made


def caches(layout: str, split: int = 1) -> list[torch.Tensor]:
    """Views of the layers' caches, each block cut into ``split`` kernel blocks."""
    values = torch.arange(NUM_BLOCKS * NUM_LAYERS * PAGE, dtype=torch.float32)
    if layout == "a tensor a layer":
        whole = [part.clone() for part in values.chunk(NUM_LAYERS)]
        return [part.view(NUM_BLOCKS * split, 2, 4 // split, 16) for part in whole]
    if layout == "layers outermost":
        return list(values.view(NUM_LAYERS, NUM_BLOCKS * split, 2, 4 // split, 16))
    return list(values.view(NUM_BLOCKS, NUM_LAYERS, 2, 4, 16).unbind(1))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bound, in bytes: room for five pages, or one block of all layers and a half."""
    monkeypatch.setattr(block_copies, "MAX_BYTES", 5 * PAGE * FLOAT)
    return 5 * PAGE * FLOAT


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        ("a tensor a layer", 1),
        ("a tensor a layer", 2),
        ("layers outermost", 1),
        ("layers outermost", 2),
        ("blocks outermost", 1),
    ],
)
def test_the_temporary_is_bounded_and_the_copies_are_vllms(
    small: int, layout: str, split: int
) -> None:
    pairs = [KVCacheBlockCopy(source, 63 - source) for source in range(30)]
    wanted, got = caches(layout, split), caches(layout, split)
    with Largest() as at_once:
        copy_kv_cache_blocks_inplace(wanted, NUM_BLOCKS, pairs)
    with Largest() as in_slices:
        block_copies._in_slices(copy_kv_cache_blocks_inplace, got, NUM_BLOCKS, pairs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert not torch.equal(got[0], caches(layout, split)[0])
    assert 0 < in_slices.bytes <= small < at_once.bytes


def test_no_copies_and_no_caches() -> None:
    block_copies._in_slices(copy_kv_cache_blocks_inplace, [], NUM_BLOCKS, [])


def test_both_runners_copy_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in (runner_v1, runner_v2):
        monkeypatch.setattr(runner, "copy_kv_cache_blocks_inplace", copy_kv_cache_blocks_inplace)
    block_copies.install()
    block_copies.install()
    asked = []
    monkeypatch.setattr(block_copies, "MAX_BYTES", 1)
    monkeypatch.setattr(block_copies, "_block_bytes", lambda *given: asked.append(given) or 1)
    for runner in (runner_v1, runner_v2):
        runner.copy_kv_cache_blocks_inplace(caches("layers outermost"), NUM_BLOCKS, [(1, 2)])
    assert len(asked) == 2 * NUM_LAYERS
