"""A cache that holds labels instead of KV, and plays the steps of policy/step/batch.py on itself.

What moves, and where to, is the planner's word: the moves are not worked out again here. It tells
what each query read, for the rule (policy/visibility.py) to judge.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from vllm_sepllm.policy.keys.masked_tiles import query_tiles
from vllm_sepllm.policy.step.batch import BatchStep, Moves, Saves
from vllm_sepllm.policy.step.prefill import Chunk

# row of the batch, compact index -> where its label is
Slots = Callable[[int, int], Hashable]


class LabelledCache:
    """Slot -> label."""

    def __init__(self) -> None:
        self.memory: dict[Hashable, Any] = {}

    def write(self, slot: Hashable, label: Any) -> None:
        """Fill an entry of a request. Whoever knows what must not be written overrides it."""
        self.memory[slot] = label

    def rotated(self, label: Any, delta: int) -> Any:
        """The label of the same token at another position, for whoever renumbers."""
        raise NotImplementedError(f"{label} moves by {delta}")

    def play(
        self, step: BatchStep, labels: Sequence[Any], slot: Slots, tile_size: int = 7
    ) -> list[list[Any]]:
        """Play a step; ``labels`` are its tokens'. Returns what the query of each token reads."""
        saved: set[Hashable] = set()
        rotations = step.rotations
        for row, entry, delta in zip(
            rotations.rows.tolist(),
            rotations.entries.tolist(),
            rotations.delta.tolist(),
            strict=True,
        ):
            place = slot(row, entry)
            self.write(place, self.rotated(self.memory[place], delta))
        self._move(step.commit_spills, slot)
        self._move(step.commits, slot)
        self._save(step.saves_before, slot, saved)
        self._move(step.spills, slot)
        reads: list[list[Any]] = []
        for row, chunk in enumerate(step.chunks, start=step.num_library):
            own = labels[int(step.first[row]) : int(step.first[row + 1])]
            keys = [self.memory[slot(row, i)] for i in range(chunk.num_cached)]
            reads += self._attend(chunk, [*keys, *own], tile_size)
        self._move(step.moves_after, slot)
        saves = step.token_saves
        for token, target in zip(saves.tokens.tolist(), saves.slots.tolist(), strict=True):
            self._keep(target, labels[token], saved)
        written: set[Hashable] = set()
        for token, label in enumerate(labels):
            if (entry := int(step.target[token])) >= 0:
                place = slot(int(step.rows[token]), entry)
                assert place not in written, "two tokens in one entry"
                written.add(place)
                self.write(place, label)
        assert (step.target[len(labels) :] == -1).all(), "padding is written"
        reads = self._library_reads(step, slot) + reads
        self._save(step.saves_after, slot, saved)
        return reads

    def _attend(self, chunk: Chunk, keys: list[Any], tile_size: int) -> list[list[Any]]:
        reads = []
        for tile in query_tiles(chunk, tile_size):
            num_full = len(tile.keys) - tile.hidden.shape[1]
            for hidden in tile.hidden:
                seen = tile.keys[:num_full].tolist() + tile.keys[num_full:][~hidden].tolist()
                reads.append([keys[key] for key in seen])
        return reads

    def _library_reads(self, step: BatchStep, slot: Slots) -> list[list[Any]]:
        """Causal attention over compact lengths: the last token reads all entries."""
        reads = []
        for row, length in enumerate(step.lengths.tolist()):
            num_new = int(step.first[row + 1] - step.first[row])
            assert num_new <= step.max_query_len
            for end in range(length - num_new + 1, length + 1):
                reads.append([self.memory[slot(row, i)] for i in range(end)])
        return reads

    def _move(self, moves: Moves, slot: Slots) -> None:
        rows = moves.rows.tolist()
        sources, targets = (
            [slot(row, entry) for row, entry in zip(rows, entries.tolist(), strict=True)]
            for entries in (moves.source, moves.target)
        )
        # a GPU runs them in any order
        assert len({*targets}.difference(sources)) == len(targets), "a target twice, or a source"
        for source, target in zip(sources, targets, strict=True):
            self.write(target, self.memory[source])

    def _save(self, saves: Saves, slot: Slots, saved: set[Hashable]) -> None:
        for row, entry, target in zip(
            saves.rows.tolist(), saves.source.tolist(), saves.slots.tolist(), strict=True
        ):
            self._keep(target, self.memory[slot(row, entry)], saved)

    def _keep(self, slot: Hashable, label: Any, saved: set[Hashable]) -> None:
        """Fill a slot of a checkpoint, which a step does at most once."""
        assert slot not in saved, "a slot of a checkpoint is filled twice"
        saved.add(slot)
        self.memory[slot] = label
