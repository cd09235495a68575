"""The last checkpoint of each decoding request, renewed block by block.

Where all layers are SepLLM layers the blocks of a request that ends are a checkpoint as they are,
at any position. Layers of other kinds can only resume at block boundaries, where the ring has
moved on by the time the request ends. So the state is copied at each boundary, over the copy of
the boundary before: a request keeps one, and the next turn of a chat starts from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import (
    CheckpointRegistry,
)

if TYPE_CHECKING:
    from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
    from vllm_sepllm.integration.scheduler.manager import SepLLMManager


@dataclass(frozen=True, slots=True)
class _Noted:
    request: Request
    position: int


class StandingCheckpoints:
    """Copies the state of requests that stand at a boundary as a step begins."""

    def __init__(
        self, managers: Sequence["SepLLMManager"], registry: CheckpointRegistry, unit: int
    ) -> None:
        """``unit``: boundaries are its multiples."""
        self._managers = managers
        self._pool = managers[0].block_pool
        self._registry = registry
        self._unit = unit
        self._noted: list[_Noted] = []
        # request -> the copies of its last checkpoint and their keys
        self._copies: dict[str, list[tuple[KVCacheBlock, BlockHashWithGroupId | None]]] = {}

    def note(self, request: Request, num_dense: int) -> None:
        """The request, whose a + n is given, takes part in the step that is being scheduled."""
        position = request.num_computed_tokens
        # a prompt has checkpoints of its own; up to a + n tokens every block is found anyway
        if position % self._unit == 0 and position > max(num_dense, request.num_prompt_tokens):
            self._noted.append(_Noted(request, position))

    def renew(self, separators: "RequestSeparators") -> None:
        """Nothing is written yet: copy the state of the noted requests that were not preempted."""
        noted, self._noted = self._noted, []
        for item in noted:
            request = item.request
            is_running = request.request_id in self._managers[0].req_to_blocks
            if is_running and request.num_computed_tokens == item.position:
                self._renew(request, item.position, separators)

    def _renew(self, request: Request, position: int, separators: "RequestSeparators") -> None:
        number = position // self._pool.hash_block_size - 1
        hashes = separators.salted(request)
        if number >= len(hashes) or self._registry.has(hashes[number], ()):
            return
        self._give_up(request.request_id)
        own = [m.written_blocks(request.request_id, position) for m in self._managers]
        if sum(len(numbers) for numbers in own) > self._pool.get_num_free_blocks():
            return
        state = {}
        copies: list[KVCacheBlock] = []
        for manager, numbers in zip(self._managers, own, strict=True):
            fresh = dict(zip(numbers, self._pool.get_new_blocks(len(numbers)), strict=True))
            blocks = manager.req_to_blocks[request.request_id]
            for i, block in fresh.items():
                manager.copy_block(blocks[i], block)
            state[manager.kv_cache_group_id] = manager.state(request.request_id, position, fresh)
            copies.extend(fresh.values())
        self._registry.add(hashes[number], position, (), state)
        self._copies[request.request_id] = [(block, block.block_hash) for block in copies]

    def _give_up(self, request_id: str) -> None:
        """Hand the copies of the request's last checkpoint back, to be reused first."""
        copies = self._copies.pop(request_id, [])
        # one that is in use is being copied for a request that starts from it
        idle = [b for b, key in copies if b.ref_cnt == 0 and b.block_hash == key]
        self._pool.touch(idle)
        self._pool.evict_blocks({block.block_id for block in idle})
        self._pool.free_blocks(idle)

    def forget(self, request_id: str) -> None:
        """The request has ended; its last checkpoint stays."""
        self._copies.pop(request_id, None)
