"""Prefixes of at most a + n tokens: their layout is vLLM's own, and so are their keys.

Block i of such a prefix holds the tokens of block i, so each block is found by its own hash and
every block boundary is a hit. The ring overwrites these blocks later; what is cached is copied
away before that.
"""

from collections.abc import Callable, Iterable, Sequence

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.scheduler.prefix_cache.watched_pool import WatchedPool


class DensePrefixes:
    """The first blocks of requests in vLLM's map of cached blocks, for all SepLLM groups."""

    def __init__(self, managers: Sequence[SepLLMManager], unit: int) -> None:
        """``unit``: a prefix ends at multiples of it."""
        self._managers = managers
        self._pool = managers[0].block_pool
        self._hash_size = self._pool.hash_block_size
        self.unit = unit
        self.group_ids = tuple(m.kv_cache_group_id for m in managers)
        # told of requests whose full blocks in a range of tokens got their keys
        self.listeners: list[Callable[[LiveRequest, int, int], None]] = []

    def find(self, hashes: Sequence[BlockHash], max_length: int) -> int:
        """Tokens of the longest prefix whose blocks every group has; at most a + n."""
        limit = min(max_length, len(hashes) * self._hash_size)
        position = 0
        while position + self.unit <= limit:
            end = position + self.unit
            if any(self.missing(m, hashes, position, end) for m in self._managers):
                break
            position = end
        return position

    def blocks(
        self, manager: SepLLMManager, hashes: Sequence[BlockHash], position: int
    ) -> list[KVCacheBlock]:
        """The blocks of a prefix of ``position`` tokens, which :meth:`find` returned."""
        found = [self._block(manager, hashes, i) for i in range(position // manager.block_size)]
        return [block for block in found if block is not None]

    def missing(
        self, manager: SepLLMManager, hashes: Sequence[BlockHash], start: int, end: int
    ) -> list[int]:
        """Numbers of the whole blocks in [start, end) that are not cached."""
        size = manager.block_size
        numbers = range(start // size, end // size)
        return [i for i in numbers if self._block(manager, hashes, i) is None]

    def keys(self, hashes: Sequence[BlockHash], start: int, end: int) -> list[BlockHashWithGroupId]:
        """Keys of the whole blocks in [start, end), of all groups."""
        return [
            self._key(manager, hashes, number)
            for manager in self._managers
            for number in range(start // manager.block_size, end // manager.block_size)
        ]

    def has(self, keys: Iterable[BlockHashWithGroupId]) -> bool:
        """Whether each of the keys has a block."""
        get_one_block = self._pool.cached_block_hash_to_block.get_one_block
        return all(get_one_block(key) is not None for key in keys)

    def _block(
        self, manager: SepLLMManager, hashes: Sequence[BlockHash], number: int
    ) -> KVCacheBlock | None:
        key = self._key(manager, hashes, number)
        return self._pool.cached_block_hash_to_block.get_one_block(key)

    def _key(
        self, manager: SepLLMManager, hashes: Sequence[BlockHash], number: int
    ) -> BlockHashWithGroupId:
        name = hashes[(number + 1) * manager.block_size // self._hash_size - 1]
        return make_block_hash_with_group_id(name, manager.kv_cache_group_id)

    def add(
        self,
        manager: SepLLMManager,
        hashes: Sequence[BlockHash],
        number: int,
        block: KVCacheBlock,
    ) -> None:
        """Give block ``number`` its key, unless it has one."""
        if block.block_hash is None:
            num_tokens = (number + 1) * manager.block_size
            key = self._key(manager, hashes, number)
            self._pool._insert_block_hash(key, block, num_tokens=num_tokens)

    def added(self, live: LiveRequest, start: int, end: int) -> None:
        """The request's full blocks in [start, end) have got their keys, in all groups."""
        for listener in self.listeners:
            listener(live, start, end)

    def move_away(self, block: KVCacheBlock) -> KVCacheBlock | None:
        """Take the key from a block that its request overwrites in this step.

        Returns:
            A new block that has the key from now on and must get the content; None if another
            block has the key as well, or if no block is free.
        """
        key, num_tokens = block.block_hash, block.block_hash_num_tokens
        assert key is not None, "only cached blocks are moved away"
        # unlike an eviction: what the block held may stay in the cache
        self._pool._remove_cached_block_hashes(block)
        copy = None
        if not self.has([key]) and self._pool.get_num_free_blocks():
            (copy,) = self._pool.get_new_blocks(1)
            self._pool._insert_block_hash(key, copy, num_tokens=num_tokens)
        if isinstance(self._pool, WatchedPool):
            self._pool.tell(key)
        return copy
