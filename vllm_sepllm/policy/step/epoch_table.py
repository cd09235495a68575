"""Table of the epochs of positions, for many requests at once: a slot a request."""

from collections.abc import Callable, Sequence

import numpy as np

from vllm_sepllm.policy.epochs import Epochs
from vllm_sepllm.policy.step.plan import Positions
from vllm_sepllm.policy.visibility import IntArray

_FIRST_SIZE = 64  # slots
_NEVER = -1  # as a position: none that a request can have

# row of a step -> the epochs of its request, and the ids that are known of it
OfRow = Callable[[int], tuple[Epochs, Sequence[int]]]


class EpochTable:
    """Which epoch each request is in.

    A slot holds for steps that start in [first, end) (positions), where the shift is the same. A
    step of all requests is a few vector operations; a request that has left its epoch, or has moved
    by preemption or a prefix hit, is looked up again.
    """

    def __init__(self) -> None:
        # [first, end and shift, slot]
        self._epochs = np.full((3, _FIRST_SIZE), _NEVER, dtype=np.int64)

    def forget(self, slot: int) -> None:
        """The slot goes to another request, or its request's tokens were replaced."""
        if slot < self._epochs.shape[1]:
            self._epochs[:, slot] = _NEVER

    def step(self, slots: IntArray, start: IntArray, of_row: OfRow) -> Positions:
        """Positions of a step, of which no row goes beyond the epoch in which it starts.

        Args:
            slots: [num_rows], each at most once.
            start: [num_rows], position in the text of the row's first token.
            of_row: asked of rows that must be looked up, and of those that begin an epoch.
        """
        while len(slots) and slots.max() >= self._epochs.shape[1]:
            self._epochs = np.concatenate([self._epochs, np.full_like(self._epochs, _NEVER)], 1)
        first, end, _ = self._epochs[:, slots]
        for row in ((start < first) | (start >= end)).nonzero()[0].tolist():
            epochs, token_ids = of_row(row)
            epoch = epochs.at(int(start[row]), token_ids)
            self._epochs[:, slots[row]] = epoch.start, epoch.end, epoch.shift
        first, _, shift = self._epochs[:, slots]
        renumber = {}
        for row in ((first == start) & (start > 0)).nonzero()[0].tolist():
            epochs, token_ids = of_row(row)
            renumber[row] = epochs.renumbering(epochs.at(int(start[row]), token_ids))
        return Positions(shift, renumber)
