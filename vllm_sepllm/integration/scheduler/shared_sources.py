"""Reference counts that keep a prefix in the pool while several running requests have copies."""

from collections import Counter
from collections.abc import Iterable, Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


class SharedSources:
    """Blocks of one group of which several running requests have copies, each held by a reference.

    Where vLLM shares blocks, every request that runs holds them. A copy holds nothing of its
    source, and a full pool would evict the beginning that most of its requests have in common. The
    source of a single copy is not held: the next turn of a chat finds the state that this one
    leaves.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool
        # key of a source -> running requests that have a copy
        self._num_users: Counter[BlockHashWithGroupId] = Counter()
        # sources of several copies; one reference each
        self.held: dict[BlockHashWithGroupId, KVCacheBlock] = {}

    def copied(self, sources: Sequence[KVCacheBlock]) -> list[BlockHashWithGroupId]:
        """A request starts with copies of ``sources``; the keys to give back when it leaves."""
        keyed = {block.block_hash: block for block in sources if block.block_hash is not None}
        self._num_users.update(keyed.keys())
        for key, block in keyed.items():
            if self._num_users[key] > 1 and key not in self.held:
                self.held[key] = block
                self._pool.touch([block])
        return list(keyed)

    def release(self, key: BlockHashWithGroupId) -> None:
        """Hold the block of that key no longer, if it is held."""
        if (block := self.held.pop(key, None)) is not None:
            self._pool.free_blocks([block])

    def leaves(self, keys: Iterable[BlockHashWithGroupId]) -> None:
        """A request has lost its copies of the sources with these keys."""
        for key in keys:
            self._num_users[key] -= 1
            if self._num_users[key] < 2:
                self.release(key)
            if not self._num_users[key]:
                del self._num_users[key]
