"""Number of blocks of vLLM's pool that hold checkpoints, for one metric."""

from collections import Counter, deque

from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

# entries that a count looks at; a pool with more such blocks is counted over several counts
_MAX_VISITS = 1024
# a list that visits two entries for each new one stays within twice the live ones
_VISITS_PER_BLOCK = 2


class CheckpointBlockCount:
    """Blocks that were given keys of checkpoints, by the window of the request.

    The pool takes a key away when it reuses the block and tells nobody, so the entries are visited
    in turn: a few with each new block, the rest when they are counted.
    """

    def __init__(self) -> None:
        self._entries: deque[tuple[KVCacheBlock, BlockHashWithGroupId, int]] = deque()
        self._counts: Counter[int] = Counter()

    def add(self, block: KVCacheBlock, window: int) -> None:
        """The block has got a key."""
        assert block.block_hash is not None, "only blocks with a key are counted"
        self._entries.append((block, block.block_hash, window))
        self._counts[window] += 1
        self._visit(_VISITS_PER_BLOCK)

    def count(self) -> dict[int, int]:
        """Window -> blocks that still have their key; windows that had any stay, with 0."""
        self._visit(_MAX_VISITS)
        return dict(self._counts)

    def _visit(self, num_visits: int) -> None:
        entries = self._entries
        for _ in range(min(num_visits, len(entries))):
            entry = entries.popleft()
            block, key, window = entry
            if block.block_hash == key:
                entries.append(entry)
            else:
                self._counts[window] -= 1
