"""Registry of the prefixes that have a checkpoint in vLLM's block pool."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest
from vllm_sepllm.integration.scheduler.prefix_cache.block_count import CheckpointBlockCount

# blocks of the pool per new checkpoint between two sweeps that forget checkpoints without all of
# their blocks: the checkpoint of a long text takes kilobytes of host memory
_BLOCKS_PER_SWEEP = 8

State = Mapping[int, Sequence[KVCacheBlock]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The compact state of a request after some of its tokens.

    Attributes:
        position: how many tokens.
        rest: token ids after the last whole hash block.
        blocks: KV cache group -> its blocks in compact order, each with the key it had; a block
            that lost its key was reused by the pool.
    """

    position: int
    rest: tuple[int, ...]
    blocks: dict[int, tuple[tuple[KVCacheBlock, BlockHashWithGroupId], ...]]

    @property
    def is_whole(self) -> bool:
        """Whether the pool still has every block: vLLM's own LRU decides."""
        return all(b.block_hash == key for group in self.blocks.values() for b, key in group)

    @property
    def keys(self) -> set[BlockHashWithGroupId]:
        """Of the blocks of all groups."""
        return {key for group in self.blocks.values() for _, key in group}

    def group(self, group_id: int) -> list[KVCacheBlock]:
        """The blocks of one KV cache group."""
        return [block for block, _ in self.blocks[group_id]]


class CheckpointRegistry:
    """Checkpoints by the hash of their last whole hash block.

    vLLM's hashes chain over all tokens before and are salted with LoRA, multimodal content and
    cache_salt, which has a request's own policy in it (wire/choices.py).
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool
        self._hash_size = block_pool.hash_block_size
        self._by_hash: dict[BlockHash, list[Checkpoint]] = {}
        self._num_added = 0
        self._numbers = count()
        self.block_count = CheckpointBlockCount()
        # told of each new checkpoint and of the request that left it
        self.listeners: list[Callable[[LiveRequest, Checkpoint], None]] = []

    def find(
        self,
        hashes: Sequence[BlockHash],
        token_ids: Sequence[int],
        max_length: int,
        alignment: int = 1,
    ) -> Checkpoint | None:
        """The longest whole checkpoint of a request's first ``max_length`` tokens.

        Its position is a multiple of ``alignment``.
        """
        for number in range(min(max_length // self._hash_size, len(hashes)), 0, -1):
            if hashes[number - 1] not in self._by_hash:  # nearly all of a long prompt
                continue
            first = number * self._hash_size
            found = [
                c
                for c in self._whole(hashes[number - 1])
                if c.position <= max_length
                and c.position % alignment == 0
                and c.rest == tuple(token_ids[first : c.position])
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

    def add(self, live: LiveRequest, position: int, state: State) -> Checkpoint:
        """Remember a request's state after ``position`` tokens, at least one whole hash block.

        Its blocks get keys and may be freed afterwards.
        """
        num_hashes = position // self._hash_size
        rest = tuple(live.request._all_token_ids[num_hashes * self._hash_size : position])
        # the metrics tell blocks apart by the window of the request
        window = live.policy.window
        keyed = {
            group_id: tuple(
                (block, self._key(block, group_id, position, window)) for block in blocks
            )
            for group_id, blocks in state.items()
        }
        checkpoint = Checkpoint(position, rest, keyed)
        block_hash = live.request.block_hashes[num_hashes - 1]
        self._by_hash.setdefault(block_hash, []).append(checkpoint)
        for listener in self.listeners:
            listener(live, checkpoint)
        self._num_added += 1
        if self._num_added > self._pool.num_gpu_blocks // _BLOCKS_PER_SWEEP:
            self._num_added = 0
            for known in list(self._by_hash):
                self._whole(known)
        return checkpoint

    def _key(
        self, block: KVCacheBlock, group_id: int, position: int, window: int
    ) -> BlockHashWithGroupId:
        """The block's key in vLLM's map of cached blocks, given now if it has none."""
        if block.block_hash is None:
            # the key need only be unique: content is found through checkpoints
            name = BlockHash(b"sepllm" + next(self._numbers).to_bytes(26, "big"))
            key = make_block_hash_with_group_id(name, group_id)
            self._pool._insert_block_hash(key, block, num_tokens=position)
            self.block_count.add(block, window)
        assert block.block_hash is not None
        return block.block_hash
