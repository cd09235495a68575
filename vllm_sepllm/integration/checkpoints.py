"""Which prefixes have a checkpoint in vLLM's block pool, and which were seen before."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

# 32 bytes each; a hash that was forgotten costs one more miss, never a wrong hit
_MAX_SEEN = 1 << 17


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The compact state of a request after some of its tokens.

    Attributes:
        position: how many tokens.
        rest: token ids after the last whole hash block.
        blocks: its blocks in compact order, each with the key it had; a block that lost its key
            was reused by the pool.
    """

    position: int
    rest: tuple[int, ...]
    blocks: tuple[tuple[KVCacheBlock, BlockHashWithGroupId], ...]

    @property
    def is_whole(self) -> bool:
        """Whether the pool still has every block: vLLM's own LRU decides."""
        return all(block.block_hash == key for block, key in self.blocks)


class CheckpointRegistry:
    """Checkpoints by the vLLM block hash of their last whole block.

    vLLM's hashes chain over all tokens before and are salted with LoRA, multimodal content and
    cache_salt. A registry serves one policy, so nothing is shared across policies.
    """

    def __init__(self, block_pool: BlockPool, group_id: int, block_size: int) -> None:
        self._pool = block_pool
        self._group_id = group_id
        self._block_size = block_size
        self._by_hash: dict[BlockHash, list[Checkpoint]] = {}
        self._num_added = 0
        self._numbers = count()
        self._seen: OrderedDict[BlockHash, None] = OrderedDict()

    def find(
        self, block_hashes: Sequence[BlockHash], token_ids: Sequence[int], max_length: int
    ) -> Checkpoint | None:
        """The longest whole checkpoint of a request's first ``max_length`` tokens."""
        size = self._block_size
        for num_blocks in range(min(max_length // size, len(block_hashes)), 0, -1):
            first = num_blocks * size
            found = [
                c
                for c in self._whole(block_hashes[num_blocks - 1])
                if c.position <= max_length and c.rest == tuple(token_ids[first : c.position])
            ]
            if found:
                return max(found, key=lambda c: c.position)
        return None

    def has(self, block_hash: BlockHash, rest: tuple[int, ...]) -> bool:
        """Whether a whole checkpoint ends exactly there."""
        return any(c.rest == rest for c in self._whole(block_hash))

    def _whole(self, block_hash: BlockHash) -> list[Checkpoint]:
        """The checkpoints of a hash; those that lost a block are forgotten."""
        known = self._by_hash.get(block_hash, [])
        whole = [c for c in known if c.is_whole]
        if whole:
            self._by_hash[block_hash] = whole
        elif known:
            del self._by_hash[block_hash]
        return whole

    def add(
        self,
        block_hash: BlockHash,
        position: int,
        rest: tuple[int, ...],
        blocks: Sequence[KVCacheBlock],
    ) -> None:
        """Remember a checkpoint; its blocks get keys and may be freed afterwards."""
        keyed = tuple((block, self._key(block, position)) for block in blocks)
        self._by_hash.setdefault(block_hash, []).append(Checkpoint(position, rest, keyed))
        self._num_added += 1
        if self._num_added > 2 * self._pool.num_gpu_blocks:
            self._num_added = 0
            for known in list(self._by_hash):
                self._whole(known)

    def _key(self, block: KVCacheBlock, position: int) -> BlockHashWithGroupId:
        """The block's key in vLLM's map of cached blocks, given now if it has none."""
        if block.block_hash is None:
            # content is found through checkpoints, so a number that never repeats will do
            name = BlockHash(b"sepllm" + next(self._numbers).to_bytes(26, "big"))
            key = make_block_hash_with_group_id(name, self._group_id)
            self._pool._insert_block_hash(key, block, num_tokens=position)
        assert block.block_hash is not None
        return block.block_hash

    def common_prefix(self, block_hashes: Sequence[BlockHash]) -> int:
        """Tokens of the longest prefix, in whole blocks, that an earlier request had too.

        The request itself counts as seen from then on.
        """
        num_common = 0
        for number, block_hash in enumerate(block_hashes, start=1):
            if block_hash in self._seen:
                num_common = number
                self._seen.move_to_end(block_hash)
            else:
                self._seen[block_hash] = None
        while len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        return num_common * self._block_size
