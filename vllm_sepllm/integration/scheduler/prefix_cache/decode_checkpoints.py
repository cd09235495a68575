"""The last checkpoint of each decoding request, renewed block by block, for hybrid models.

Where all layers are SepLLM layers the blocks of a request that ends are a checkpoint as they are,
at any position. Layers of other kinds can only resume at block boundaries, where the ring has
moved on by the time the request ends. So the state is copied at each boundary, over the copy of
the boundary before: a request keeps one, and the next turn of a chat starts from it.
"""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import CheckpointRegistry


class DecodeCheckpoints:
    """Copies the state of requests that stand at a boundary as a step begins."""

    def __init__(
        self, managers: Sequence[SepLLMManager], registry: CheckpointRegistry, unit: int
    ) -> None:
        """``unit``: boundaries are its multiples."""
        self._managers = managers
        self._pool = managers[0].block_pool
        self._registry = registry
        self._unit = unit
        # requests at a boundary, and the boundary, in the step that is being scheduled
        self._noted: list[tuple[LiveRequest, int]] = []

    def note(self, live: LiveRequest) -> None:
        """The request takes part in the step that is being scheduled."""
        position = live.request.num_computed_tokens
        # a prompt has checkpoints of its own; up to a + n tokens every block is found anyway
        first = max(live.policy.num_dense, live.request.num_prompt_tokens)
        if position % self._unit == 0 and position > first:
            self._noted.append((live, position))

    def renew(self) -> None:
        """Nothing is written yet: copy the state of the noted requests that were not preempted."""
        noted, self._noted = self._noted, []
        for live, position in noted:
            is_running = live.request.request_id in self._managers[0].req_to_blocks
            if is_running and live.request.num_computed_tokens == position:
                self._renew(live, position)

    def _renew(self, live: LiveRequest, position: int) -> None:
        number = position // self._pool.hash_block_size - 1
        hashes = live.request.block_hashes
        if number >= len(hashes) or self._registry.has(hashes[number], ()):
            return
        self._give_up(live)
        own = [m.to_own(live, position) for m in self._managers]
        if sum(len(numbers) for numbers in own) > self._pool.get_num_free_blocks():
            return
        state = {}
        copies: list[KVCacheBlock] = []
        for manager, numbers in zip(self._managers, own, strict=True):
            fresh = dict(zip(numbers, self._pool.get_new_blocks(len(numbers)), strict=True))
            blocks = manager.req_to_blocks[live.request.request_id]
            for i, block in fresh.items():
                manager.copy_block(blocks[i], block)
            state[manager.kv_cache_group_id] = manager.state(live, position, fresh)
            copies.extend(fresh.values())
        self._registry.add(live, position, state)
        live.holding.last_copies = [(b, b.block_hash) for b in copies if b.block_hash is not None]

    def _give_up(self, live: LiveRequest) -> None:
        """Hand the copies of the request's last checkpoint back, to be reused first."""
        copies, live.holding.last_copies = live.holding.last_copies, []
        # a block in use is being copied for a request that starts from it
        idle = [b for b, key in copies if b.ref_cnt == 0 and b.block_hash == key]
        self._pool.touch(idle)
        self._pool.evict_blocks({block.block_id for block in idle})
        self._pool.free_blocks(idle)
