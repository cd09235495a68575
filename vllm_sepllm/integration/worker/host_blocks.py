"""Host memory for blocks of the KV cache: what the pool evicts, until it is needed again."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

from vllm_sepllm.integration.wire.host_memory import num_host_slots
from vllm_sepllm.policy.step.plan import HostTransfers


def host_blocks_of(
    runner: Any, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> "HostBlocks | None":
    """Of a model runner that has its caches; None: there is no host memory to be used."""
    num_slots = num_host_slots(vllm_config, kv_cache_config)
    if not num_slots:
        return None
    return HostBlocks(runner.kv_caches, kv_cache_config.num_blocks, num_slots)


class HostBlocks:
    """Slots of host memory, each for a block of all layers.

    A step moves blocks before all else that it does, and all copies are in the order of the
    current stream: what a step evicts is saved before the step overwrites it, what it loads is
    there before the step reads it.
    """

    def __init__(self, kv_caches: Iterable[torch.Tensor], num_blocks: int, num_slots: int) -> None:
        """Reserve host memory, pinned if the cache is on a device of its own.

        Args:
            kv_caches: of each layer, [kernel blocks, ...]; several kernel blocks make a block.
            num_blocks: of the pool.
            num_slots: of host memory.
        """
        layers = {cache.data_ptr(): cache for cache in kv_caches}
        self._blocks = [
            torch.unflatten(cache, 0, (num_blocks, cache.shape[0] // num_blocks))
            for cache in layers.values()
        ]
        self._host = [_host_memory(num_slots, blocks) for blocks in self._blocks]
        self._pinned = [
            memory.data_ptr()
            for memory, blocks in zip(self._host, self._blocks, strict=True)
            if blocks.device != memory.device
        ]

    def release(self) -> None:
        """Let go of the caches."""
        self._blocks = []

    def unpin(self) -> None:
        """Give the host memory back, once no copy is on its way.

        What is freed pinned stays in memory, and CUDA pins no address twice: the next engine of the
        process may be given the same ones.
        """
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
        self._host, self._pinned = [], []

    def move(self, transfers: HostTransfers) -> None:
        """Do what a step asks for, before it."""
        for layer, host in zip(self._blocks, self._host, strict=True):
            for slot, block in transfers.saves.items():
                host[slot].copy_(layer[block], non_blocking=True)
            for block, slot in transfers.loads.items():
                layer[block].copy_(host[slot], non_blocking=True)


def _host_memory(num_slots: int, blocks: torch.Tensor) -> torch.Tensor:
    """[num_slots, ...] for blocks of a layer, in as many bytes as that takes.

    ``torch.empty(pin_memory=True)`` would take the next power of two, up to twice as many; vLLM's
    ``pin_tensor``, no interface of it, can go when torch pins what is asked for.
    """
    memory = torch.empty((num_slots, *blocks.shape[1:]), dtype=blocks.dtype)
    if blocks.device != memory.device:
        pin_tensor(memory)
    return memory
