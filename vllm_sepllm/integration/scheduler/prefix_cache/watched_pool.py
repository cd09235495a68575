"""vLLM's block pool, which tells listeners of what it evicts: it alone knows, and has none."""

from collections.abc import Callable, Collection
from typing import Protocol

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock, get_group_id
from vllm.v1.request import Request


class PoolListener(Protocol):
    """Whoever must know what blocks of SepLLM groups lose."""

    def lost(self, key: BlockHashWithGroupId) -> None:
        """A block has lost this key; another one may have it."""

    def clear(self) -> None:
        """No block has a key any more."""


class WatchedPool(BlockPool):
    """A pool that was made by vLLM; its own events of SepLLM groups would name no prefixes.

    Attributes:
        group_ids: KV cache groups of SepLLM layers.
        listeners: who must know.
        on_hit: told of a request that asks for a report of its hit in a group.
        handed_out: ids of blocks that were handed out lately; who reads it empties it.
    """

    group_ids: Collection[int]
    listeners: list[PoolListener]
    on_hit: Callable[[Request, int], None]
    handed_out: set[int]

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """See the base class."""
        blocks: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        self.handed_out.update(block.block_id for block in blocks)
        return blocks

    def _emit_block_removed_events(self, block_hashes: list[BlockHashWithGroupId]) -> None:
        ours = [key for key in block_hashes if get_group_id(key) in self.group_ids]
        super()._emit_block_removed_events([key for key in block_hashes if key not in ours])
        for key in ours:
            self.tell(key)

    def tell(self, key: BlockHashWithGroupId) -> None:
        """A block has lost this key."""
        for listener in self.listeners:
            listener.lost(key)

    def emit_cached_block_events(
        self, request: Request, num_cached_blocks: int, block_size: int, kv_cache_group_id: int
    ) -> None:
        """See the base class; a compact block is no block of tokens."""
        if kv_cache_group_id in self.group_ids:
            self.on_hit(request, kv_cache_group_id)
        else:
            super().emit_cached_block_events(
                request, num_cached_blocks, block_size, kv_cache_group_id
            )

    def reset_prefix_cache(self) -> bool:
        """See the base class."""
        is_reset: bool = super().reset_prefix_cache()
        for listener in self.listeners if is_reset else ():
            listener.clear()
        return is_reset


def watch(pool: BlockPool, group_ids: Collection[int], listener: PoolListener) -> WatchedPool:
    """Tell ``listener`` from now on what blocks of these groups lose."""
    if not isinstance(pool, WatchedPool):
        # vLLM makes the pool itself, deep in its own constructors
        pool.__class__ = WatchedPool
        assert isinstance(pool, WatchedPool)
        pool.group_ids, pool.listeners, pool.handed_out = group_ids, [], set()
    pool.listeners.append(listener)
    return pool
