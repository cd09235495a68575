"""Positions of one request's separators, grown as its tokens become known."""

from array import array
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.definition import Separators
from vllm_sepllm.policy.visibility import IntArray, Policy


class SeparatorIndex:
    """Append-only list of the separators of one request at positions >= initial_tokens."""

    __slots__ = ("_positions", "_separators", "num_seen", "policy")

    def __init__(self, policy: Policy, separators: Separators) -> None:
        """``policy`` is the request's; ``separators`` are the engine's, shared by all requests."""
        self.policy = policy
        self._separators = separators
        self._positions = array("i")  # 4 bytes a separator
        self.num_seen = policy.initial_tokens  # first position that was not taken in yet

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Take in tokens up to position ``num_tokens``; those seen before are not read again.

        Raises:
            IndexError: if ``token_ids`` does not reach that far. The plan needs settled tokens
                alone, so this is a bug in the caller, and a short index would drop separators.
        """
        first = self.num_seen
        if num_tokens <= first:
            return
        if len(token_ids) < num_tokens:
            raise IndexError(
                f"separators up to position {num_tokens} were asked for, "
                f"but only {len(token_ids)} token ids are known"
            )
        previous = token_ids[first - 1] if first else None
        if num_tokens - first == 1:  # a decode step: no array for one token
            if self._separators.includes(token_ids[first], first, previous):
                self._positions.append(first)
        else:
            is_separator = self._separators.mask(token_ids[first:num_tokens], first, previous)
            found = first + np.flatnonzero(is_separator)
            self._positions.frombytes(found.astype(np.intc).tobytes())
        self.num_seen = num_tokens

    def truncate(self, num_tokens: int) -> None:
        """Forget everything from position ``num_tokens`` on: those tokens were replaced."""
        del self._positions[self.count_below(num_tokens) :]
        self.num_seen = min(self.num_seen, max(num_tokens, self.policy.initial_tokens))

    def count_below(self, position: int) -> int:
        """Separators at positions in [a, position). They must have been taken in."""
        return bisect_left(self._positions, position)

    def num_spilled(self, num_tokens: int) -> int:
        """Separators that left the window in ``num_tokens`` tokens; they must have been seen."""
        return self.count_below(layout.num_left_window(self.policy, num_tokens))

    def positions(self, first: int, last: int) -> IntArray:
        """Positions of separators number ``first`` to ``last`` (exclusive), ascending."""
        return np.array(self._positions[first:last], dtype=np.int64)
