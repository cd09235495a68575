"""Prefixes that several running requests began with stay in the pool while these run."""

from collections import Counter
from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


class SourcePins:
    """References on the blocks that requests of one group were copied from.

    Where vLLM shares blocks, all who run hold them. Copies hold nothing of their source, and a full
    pool would evict a prompt's beginning that most of its requests have in common. A lone user pins
    nothing: the next turn of a chat finds the state that this one leaves.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool
        # of a source's key, the running requests that were copied from it
        self._num_users: Counter[BlockHashWithGroupId] = Counter()
        # request -> keys of its sources
        self._keys: dict[str, list[BlockHashWithGroupId]] = {}
        # request -> sources that it holds
        self._held: dict[str, list[KVCacheBlock]] = {}

    def copied(self, request_id: str, sources: Sequence[KVCacheBlock]) -> None:
        """The request starts with copies of ``sources``, of which the pool still has the keys."""
        keyed = [(block, block.block_hash) for block in sources if block.block_hash is not None]
        held = [block for block, key in keyed if self._num_users[key]]
        self._pool.touch(held)
        self._held[request_id] = held
        self._keys[request_id] = [key for _, key in keyed]
        self._num_users.update(self._keys[request_id])

    def overwritten(self, block: KVCacheBlock) -> None:
        """Its own request writes over the block, of which others were copied."""
        for held in self._held.values():
            if block in held:
                held.remove(block)
                self._pool.free_blocks([block])

    def release(self, request_id: str) -> None:
        """Hold nothing for the request any more."""
        self._pool.free_blocks(self._held.pop(request_id, ()))

    def leaves(self, request_id: str) -> None:
        """The request has lost its blocks."""
        self.release(request_id)
        for key in self._keys.pop(request_id, ()):
            self._num_users[key] -= 1
            if not self._num_users[key]:
                del self._num_users[key]
