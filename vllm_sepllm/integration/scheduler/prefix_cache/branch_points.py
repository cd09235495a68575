"""Branch points: where prompts were seen to part, which is where a checkpoint is worth most.

A system prompt, its few-shot examples and a document are levels of a tree whose leaves are prompts.
Where it branches is a fact about token sequences, not about the cache: it outlives eviction and a
reset of the prefix cache, so prompts that come back find each other again.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from vllm.v1.core.kv_cache_utils import BlockHash

# about 200 bytes each; a forgotten hash costs a miss, never a wrong hit
_MAX_HASHES = 1 << 17

# in place of the following hash where several follow
_SEVERAL = BlockHash(b"")


class BranchPoints:
    """For each block hash of the prompts seen lately, which hash follows it."""

    def __init__(self, max_hashes: int = _MAX_HASHES) -> None:
        """``max_hashes``: hashes that are remembered, those seen last."""
        self._max_hashes = max_hashes
        # None: prompts ended there
        self._next: OrderedDict[BlockHash, BlockHash | None] = OrderedDict()

    def see(self, hashes: Sequence[BlockHash]) -> None:
        """Compare a prompt with those seen before. Hashes chain over all blocks before."""
        for block_hash, following in zip_longest(hashes, hashes[1:]):
            known = self._next.get(block_hash)
            if known is not None:
                self._next.move_to_end(block_hash)
                if following is None or known == following:
                    continue
                following = _SEVERAL
            self._next[block_hash] = following
        while len(self._next) > self._max_hashes:
            self._next.popitem(last=False)

    def between(self, hashes: Sequence[BlockHash], first: int, last: int) -> Iterator[int]:
        """Numbers of blocks in (first, last] behind which prompts part, ascending."""
        for number in range(first + 1, min(last, len(hashes)) + 1):
            if self._next.get(hashes[number - 1]) is _SEVERAL:
                yield number
