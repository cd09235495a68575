"""Table of the spills of decode steps, for many requests at once: a slot a request."""

from collections.abc import Sequence

import numpy as np

from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.visibility import BoolArray, IntArray

_FIRST_SIZE = 64  # slots
_AHEAD = 64  # separators laid out in a slot: about as many as a default window has
_NEVER = -1  # as a position: none that a request can have


def _column() -> IntArray:
    return np.full(_FIRST_SIZE, _NEVER, dtype=np.int64)


def _doubled(column: IntArray) -> IntArray:
    return np.concatenate([column, column])


class DecodeTable:
    """How many separators have left each request's window, and when the next one does.

    A slot holds for steps of one token that start in [first, last] (positions): no separator
    leaves before ``last``, and at ``last`` one leaves, or the slot must be looked up again. A step
    of all requests is a few vector operations. A request that moved by a prefill, preemption or a
    prefix hit is outside the range of its slot, and is looked up again.
    """

    def __init__(self) -> None:
        self._num_slots = 0
        self._free: list[int] = []
        self._first = _column()
        self._last = _column()
        self._num_spilled = _column()  # separators that left before ``first``
        self._leaves_at = _column()  # start at which the next one leaves
        self._limit = _column()  # start up to which ``_leaving`` tells the rest
        self._base = _column()  # rank of the separator in column 0 of ``_leaving``
        # [slot, _AHEAD + 1] starts at which separators leave; the last column is never
        self._leaving = np.full((_FIRST_SIZE, _AHEAD + 1), _NEVER, dtype=np.int64)

    def add(self) -> int:
        """A slot for a request."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._num_slots
            self._num_slots += 1
            if slot == len(self._leaving):
                self._grow()
        self.forget(slot)
        return slot

    def _grow(self) -> None:
        """Twice the slots."""
        self._first, self._last, self._num_spilled = map(
            _doubled, (self._first, self._last, self._num_spilled)
        )
        self._leaves_at, self._limit, self._base = map(
            _doubled, (self._leaves_at, self._limit, self._base)
        )
        self._leaving = _doubled(self._leaving)

    def remove(self, slot: int) -> None:
        """The request has ended; the slot may go to another."""
        self._free.append(slot)

    def forget(self, slot: int) -> None:
        """The request's separators changed otherwise than by growing."""
        self._first[slot] = self._last[slot] = _NEVER

    def unknown(self, slots: IntArray, start: IntArray) -> IntArray:
        """Rows whose slot must be looked up before a step of one token from ``start``."""
        # take and nonzero: half the time of indexing and flatnonzero on so few elements
        is_outside = (start < self._first.take(slots)) | (start > self._last.take(slots))
        return is_outside.nonzero()[0]

    def look_up(
        self, slot: int, index: SeparatorIndex, token_ids: Sequence[int], start: int, stop: int
    ) -> None:
        """Lay out the steps from ``start`` on.

        Args:
            slot: of the request.
            index: its separators.
            token_ids: its known token ids, up to start + 1 - window at least.
            start: position of the step's token.
            stop: the steps from this start on must be looked up again; above ``start``.
        """
        policy = index.policy
        oldest = start - policy.window
        # all known tokens: the next look-up is a window away
        index.extend(token_ids, max(oldest + 1, len(token_ids)))
        rank = index.count_below(max(policy.initial_tokens, oldest))
        ahead = index.positions(rank, rank + _AHEAD) + policy.window
        # a step is known if the token that it overwrites is
        last = min(stop - 1, index.num_seen - 1 + policy.window)
        if len(ahead) == _AHEAD:
            last = min(last, int(ahead[-1]))
        self._leaving[slot, : len(ahead)] = ahead
        self._leaving[slot, len(ahead) :] = _NEVER
        self._first[slot], self._limit[slot] = start, last
        self._num_spilled[slot] = self._base[slot] = rank
        self._find_next(np.array([slot]))

    def _find_next(self, slots: IntArray) -> None:
        """When the next separator of each slot leaves, ``first`` and ``num_spilled`` being set."""
        column = self._num_spilled[slots] - self._base[slots]
        leaves_at, limit = self._leaving[slots, column], self._limit[slots]
        is_laid_out = (leaves_at != _NEVER) & (leaves_at <= limit)
        self._last[slots] = np.where(is_laid_out, leaves_at, limit)
        self._leaves_at[slots] = np.where(is_laid_out, leaves_at, _NEVER)

    def step(self, slots: IntArray, start: IntArray) -> tuple[IntArray, BoolArray]:
        """A step of one token for each of ``slots``, none of them unknown.

        Args:
            slots: [num_rows], each at most once.
            start: [num_rows], position of the new token.

        Returns:
            [num_rows] separators that left the window before the step, and [num_rows] whether the
            token that the new one overwrites is a separator.
        """
        num_spilled = self._num_spilled.take(slots)
        spills: BoolArray = self._leaves_at.take(slots) == start
        moved = slots[spills]
        if len(moved):
            self._first[moved] = start[spills] + 1
            self._num_spilled[moved] += 1
            self._find_next(moved)
        return num_spilled, spills
