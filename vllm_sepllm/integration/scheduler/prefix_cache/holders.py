"""Checkpoints by the keys of their blocks: which of them break when a block loses its key."""

from typing import Generic, TypeVar

from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId

from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import Checkpoint

# what whoever watches a checkpoint knows of it
Note = TypeVar("Note")


class Holders(Generic[Note]):
    """Whole checkpoints, each with a note."""

    def __init__(self) -> None:
        # by id: a checkpoint is equal to another one only if it is the same
        self._notes: dict[int, tuple[Checkpoint, Note]] = {}
        self._by_key: dict[BlockHashWithGroupId, dict[int, None]] = {}

    def add(self, checkpoint: Checkpoint, note: Note) -> None:
        """Watch a checkpoint that is whole."""
        self._notes[id(checkpoint)] = checkpoint, note
        for key in checkpoint.keys:
            self._by_key.setdefault(key, {})[id(checkpoint)] = None

    def broken_by(self, key: BlockHashWithGroupId) -> list[tuple[Checkpoint, Note]]:
        """Checkpoints that are not whole as a block has lost this key; they are forgotten."""
        found = []
        for number in list(self._by_key.get(key, ())):
            checkpoint, note = self._notes[number]
            if checkpoint.is_whole:
                continue
            del self._notes[number]
            for each in checkpoint.keys:
                holders = self._by_key[each]
                del holders[number]
                if not holders:
                    del self._by_key[each]
            found.append((checkpoint, note))
        return found
