"""Prefixes of at most a + n tokens: their layout is vLLM's own, and so are their keys.

Block i of such a prefix holds the tokens of block i, so each block is found by its own hash and
every block boundary is a hit. The ring overwrites these blocks later; what is cached is copied
away before that.
"""

from collections.abc import Sequence
from math import lcm

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    get_block_hash,
    make_block_hash_with_group_id,
)

from vllm_sepllm.integration.scheduler.manager import SepLLMManager


class DensePrefixes:
    """The first blocks of requests in vLLM's map of cached blocks, for all SepLLM groups."""

    def __init__(self, managers: Sequence[SepLLMManager], alignment: int) -> None:
        """``alignment``: hits end at multiples of it."""
        self._managers = managers
        self._pool = managers[0].block_pool
        self._hash_size = self._pool.hash_block_size
        self._unit = lcm(alignment, *(m.block_size for m in managers))

    def find(self, hashes: Sequence[BlockHash], max_length: int) -> int:
        """Tokens of the longest prefix whose blocks every group has; at most a + n."""
        limit = min(max_length, len(hashes) * self._hash_size)
        position = 0
        while position + self._unit <= limit:
            end = position + self._unit
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

    def _block(
        self, manager: SepLLMManager, hashes: Sequence[BlockHash], number: int
    ) -> KVCacheBlock | None:
        block_hash = self._hash(manager, hashes, number)
        found = self._pool.get_cached_block(block_hash, [manager.kv_cache_group_id])
        return found[0] if found else None

    def _hash(self, manager: SepLLMManager, hashes: Sequence[BlockHash], number: int) -> BlockHash:
        return hashes[(number + 1) * manager.block_size // self._hash_size - 1]

    def add(
        self,
        manager: SepLLMManager,
        hashes: Sequence[BlockHash],
        number: int,
        block: KVCacheBlock,
    ) -> None:
        """Give block ``number`` its key, unless it has one."""
        if block.block_hash is None:
            name = self._hash(manager, hashes, number)
            key = make_block_hash_with_group_id(name, manager.kv_cache_group_id)
            num_tokens = (number + 1) * manager.block_size
            self._pool._insert_block_hash(key, block, num_tokens=num_tokens)

    def move_away(self, manager: SepLLMManager, block: KVCacheBlock) -> KVCacheBlock | None:
        """Take the key from a block that its request overwrites in this step.

        Returns:
            A new block that has the key from now on and must get the content; None if another
            block has the key as well, or if no block is free.
        """
        key, num_tokens = block.block_hash, block.block_hash_num_tokens
        assert key is not None, "only cached blocks are moved away"
        self._pool.evict_blocks({block.block_id})
        if self._pool.get_cached_block(get_block_hash(key), [manager.kv_cache_group_id]):
            return None
        if self._pool.get_num_free_blocks() == 0:
            return None
        (copy,) = self._pool.get_new_blocks(1)
        self._pool._insert_block_hash(key, copy, num_tokens=num_tokens)
        return copy
