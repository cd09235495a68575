"""Prefixes that several running requests began with stay in the pool while these run."""

from collections import Counter
from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


class SourcePins:
    """References on blocks of one group that several running requests were copied from.

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
        # sources of several; one reference each
        self._held: dict[BlockHashWithGroupId, KVCacheBlock] = {}

    def copied(self, request_id: str, sources: Sequence[KVCacheBlock]) -> None:
        """The request starts with copies of ``sources``, which others may find."""
        keyed = {block.block_hash: block for block in sources if block.block_hash is not None}
        self._keys[request_id] = list(keyed)
        self._num_users.update(keyed.keys())
        for key, block in keyed.items():
            if self._num_users[key] > 1 and key not in self._held:
                self._held[key] = block
                self._pool.touch([block])

    def release(self, key: BlockHashWithGroupId) -> None:
        """Hold the block of that key no longer, if it is held."""
        if (block := self._held.pop(key, None)) is not None:
            self._pool.free_blocks([block])

    def leaves(self, request_id: str) -> None:
        """The request has lost its blocks."""
        for key in self._keys.pop(request_id, ()):
            self._num_users[key] -= 1
            if self._num_users[key] < 2:
                self.release(key)
            if not self._num_users[key]:
                del self._num_users[key]
