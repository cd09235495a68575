"""Units of dense prefixes that can be found: those whose every predecessor is there, too."""

from collections import defaultdict

from vllm.v1.core.kv_cache_utils import BlockHash


class RootedUnits:
    """Units by the hash at their end. One without its predecessors waits until they are back."""

    def __init__(self) -> None:
        self._parents: dict[BlockHash, BlockHash | None] = {}
        # dicts in place of sets: in order
        self._children: defaultdict[BlockHash | None, dict[BlockHash, None]] = defaultdict(dict)
        self._rooted: set[BlockHash] = set()

    def add(self, unit: BlockHash, parent: BlockHash | None) -> list[BlockHash]:
        """Add a unit; those that are rooted from now on, each after its predecessor."""
        self._parents[unit] = parent
        self._children[parent][unit] = None
        if parent is not None and parent not in self._rooted:
            return []
        new = self._from(unit)
        self._rooted.update(new)
        return new

    def remove(self, unit: BlockHash) -> list[BlockHash]:
        """Remove a unit; those that are rooted no longer, each before its predecessor."""
        lost = self._from(unit)[::-1] if unit in self._rooted else []
        self._rooted.difference_update(lost)
        parent = self._parents.pop(unit)
        del self._children[parent][unit]
        if not self._children[parent]:
            del self._children[parent]
        return lost

    def _from(self, unit: BlockHash) -> list[BlockHash]:
        """The unit and all behind it that are there, each after its predecessor."""
        found = [unit]
        for each in found:
            found.extend(self._children.get(each, ()))
        return found
