"""Positions of a renumbered cache: which position each query and each kept token has.

A model breaks at positions that it was not trained on, however little its cache keeps. So kept
tokens get new positions whenever the next token's would reach L = ``max_position``:

    epoch 0         token i has position i
    next epoch      begins after B tokens, when the next position would be L. Kept tokens get the
                    positions 0 .. m-1, in the order initial, tail (oldest separator first), window;
                    m is the compact length after B tokens. Token i >= B has position m + (i - B)

Tokens of the window keep their distance to later ones, so one number, the *shift*, is the position
in the text less the position in the cache for all tokens that are or come into the window. B and
the shift are functions of token ids, never of chunks, batch mates or prefix hits. The state after B
tokens belongs to the epoch that ends there; the step that starts at B turns the keys first.

Source: the position shift of StreamingLLM (arXiv:2309.17453) and of SepLLM's streaming design
(arXiv:2412.12094), for which keys are rotated once an epoch instead of once a token.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy

# fewest tokens of an epoch: turning the kept keys costs about as much as computing so many
MIN_EPOCH = 64


@dataclass(frozen=True, slots=True)
class Epoch:
    """A stretch of a request whose positions follow each other.

    Attributes:
        start: B, tokens before the epoch.
        end: tokens before the next one.
        shift: position in the text less position in the cache, for tokens that are in the window
            after ``start`` tokens and for later ones.
        num_spilled: separators that left the window before ``start``.
    """

    start: int
    end: int
    shift: int
    num_spilled: int


@dataclass(frozen=True, slots=True)
class Renumbering:
    """What changes as an epoch begins; entries that keep their position are absent.

    Attributes:
        entries: [num_entries], compact indices.
        delta: [num_entries], new position less old one.
    """

    entries: IntArray
    delta: IntArray


def has_room(policy: Policy) -> bool:
    """Whether every epoch of a request, however long, has ``MIN_EPOCH`` tokens."""
    assert policy.max_position is not None, "asked of renumbered positions"
    return policy.num_dense + policy.bound + MIN_EPOCH <= policy.max_position


def first_epoch(policy: Policy) -> Epoch:
    """The epoch with the positions of the text."""
    assert policy.max_position is not None, "asked of renumbered positions"
    return Epoch(0, policy.max_position, 0, 0)


def next_epoch(policy: Policy, last: Epoch, num_spilled: int) -> Epoch:
    """The epoch after ``last``; ``num_spilled`` separators left the window before its end."""
    assert policy.max_position is not None, "asked of renumbered positions"
    start = last.end
    length = layout.compact_length(policy, start, num_spilled)
    assert length < policy.max_position, "has_room: the next token has a position"
    return Epoch(start, start + policy.max_position - length, start - length, num_spilled)


def renumber(policy: Policy, last: Epoch, new: Epoch, separators: IntArray) -> Renumbering:
    """How entries move as ``new`` begins after ``last``.

    Args:
        policy: a, n, s and L.
        last: the epoch that ends.
        new: the epoch that begins.
        separators: [new.num_spilled - last.num_spilled], positions in the text of those that left
            the window in ``last``, ascending.
    """
    a, n = policy.initial_tokens, policy.window
    rank, held = (layout.tail_ranks(policy, epoch.num_spilled) for epoch in (new, last))
    # those that were in the tail already have the position of their place in it
    before = np.concatenate([a + np.arange(len(held)), separators - last.shift])
    before = before[len(before) - len(rank) :]
    entries = np.concatenate([np.arange(a, policy.num_dense), layout.tail_index(policy, rank)])
    delta = np.full(n, last.shift - new.shift)
    delta = np.concatenate([delta, a + np.arange(len(rank)) - before])
    moves = delta != 0
    return Renumbering(entries[moves], delta[moves])


def epochs_of(policy: Policy, is_separator: BoolArray) -> list[Epoch]:
    """All epochs of a text: [num_tokens] flags -> epochs. For pictures, not for serving."""
    counted = is_separator & (np.arange(len(is_separator)) >= policy.initial_tokens)
    found = [first_epoch(policy)]
    while (last := found[-1]).end < len(is_separator):
        left = layout.num_left_window(policy, last.end)
        found.append(next_epoch(policy, last, int(counted[:left].sum())))
    return found


class Epochs:
    """The epochs of one request, found as its tokens become known."""

    __slots__ = ("_epochs", "_index")

    def __init__(self, index: SeparatorIndex) -> None:
        """``index`` is the request's; its policy has a ``max_position``."""
        self._index = index
        self._epochs = [first_epoch(index.policy)]

    def at(self, position: int, token_ids: Sequence[int]) -> Epoch:
        """The epoch in which the token at ``position`` is computed.

        ``token_ids`` must be known up to position - window.
        """
        policy, index = self._index.policy, self._index
        while (last := self._epochs[-1]).end <= position:
            index.extend(token_ids, layout.num_left_window(policy, last.end))
            self._epochs.append(next_epoch(policy, last, index.num_spilled(last.end)))
        return last if last.start <= position else self._epochs[self._number(position)]

    def renumbering(self, epoch: Epoch) -> Renumbering:
        """What entries go through as ``epoch`` begins, which :meth:`at` returned."""
        last = self._epochs[self._number(epoch.start) - 1]
        separators = self._index.positions(last.num_spilled, epoch.num_spilled)
        return renumber(self._index.policy, last, epoch, separators)

    def _number(self, position: int) -> int:
        return bisect_right(self._epochs, position, key=attrgetter("start")) - 1

    def truncate(self, num_tokens: int) -> None:
        """The tokens from position ``num_tokens`` on were replaced."""
        while self._epochs[-1].start > num_tokens:
            self._epochs.pop()
