"""Tree of block hashes that are held: by somebody, or by a hash that follows."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_utils import BlockHash


@dataclass(slots=True)
class _Node:
    parent: BlockHash | None
    # next hashes in the tree, and who holds this one
    num_holders: int = 0


class HashTree:
    """Hashes that are held, and all hashes before them."""

    def __init__(self) -> None:
        self._nodes: dict[BlockHash, _Node] = {}

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Whether a held hash is this one or comes after it."""
        return block_hash in self._nodes

    def hold(self, parent: BlockHash | None, hashes: Sequence[BlockHash]) -> int:
        """Hold the last of the hashes once more.

        Args:
            parent: the hash before the first one, which is in the tree; None: there is none.
            hashes: that follow each other, at least one.

        Returns:
            How many of them, counted from the first, were in the tree already.
        """
        known = len(hashes)
        while known and hashes[known - 1] not in self._nodes:
            known -= 1
        for number in range(known, len(hashes)):
            before = hashes[number - 1] if number else parent
            self._nodes[hashes[number]] = _Node(before)
            if before is not None:
                self._nodes[before].num_holders += 1
        self._nodes[hashes[-1]].num_holders += 1
        return known

    def release(self, block_hash: BlockHash) -> list[BlockHash]:
        """Hold a hash once less; the hashes that nothing holds any more, the last one first."""
        gone = []
        last: BlockHash | None = block_hash
        while last is not None:
            node = self._nodes[last]
            node.num_holders -= 1
            if node.num_holders:
                break
            del self._nodes[last]
            gone.append(last)
            last = node.parent
        return gone
