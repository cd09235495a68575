"""What makes a token a separator: its id and the id before it, or its position.

``previous`` is the id of the token before the first one that is asked for; None: there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_sepllm.policy.visibility import BoolArray

IdTable = npt.NDArray[np.bool_]  # [highest id + 2]: by token id; higher ids read the last entry


def _table(token_ids: Sequence[int]) -> IdTable:
    table = np.zeros(max(token_ids, default=-1) + 2, dtype=np.bool_)
    table[list(token_ids)] = True
    return table


def _look_up(table: IdTable, token_id: int) -> bool:
    return bool(table[min(token_id, len(table) - 1)])


@dataclass(frozen=True)  # no slots: tables are made once, when they are first needed
class TokenSeparators:
    """Tokens with one of these ids are separators, some of them by the token before.

    Attributes:
        token_ids: separators wherever they stand.
        line_breaks: separators directly behind a token of ``closers``, and nowhere else.
        closers: tokens behind which a line break ends something; none of them need be a separator.
    """

    token_ids: tuple[int, ...]
    line_breaks: tuple[int, ...] = ()
    closers: tuple[int, ...] = ()

    @cached_property
    def _is_separator(self) -> IdTable:
        return _table(self.token_ids)

    @cached_property
    def _is_line_break(self) -> IdTable:
        return _table(self.line_breaks)

    @cached_property
    def _is_closer(self) -> IdTable:
        return _table(self.closers)

    def includes(self, token_id: int, position: int, previous: int | None) -> bool:
        """Whether the token at ``position`` is a separator."""
        if _look_up(self._is_separator, token_id):
            return True
        if not self.line_breaks or previous is None:
            return False
        return _look_up(self._is_line_break, token_id) and _look_up(self._is_closer, previous)

    def mask(
        self, token_ids: Sequence[int], first: int = 0, previous: int | None = None
    ) -> BoolArray:
        """:meth:`includes` for the tokens from position ``first`` on, [num_tokens]."""
        ids = np.asarray(token_ids, dtype=np.int64)
        mask: BoolArray = self._is_separator.take(ids, mode="clip")
        if self.line_breaks and len(ids):
            follows_closer = np.empty_like(mask)
            follows_closer[0] = previous is not None and _look_up(self._is_closer, previous)
            follows_closer[1:] = self._is_closer.take(ids[:-1], mode="clip")
            mask |= follows_closer & self._is_line_break.take(ids, mode="clip")
        return mask


@dataclass(frozen=True, slots=True)
class IntervalSeparators:
    """Tokens at positions that ``interval`` divides are separators, whatever they are (FixLLM)."""

    interval: int

    def includes(self, token_id: int, position: int, previous: int | None) -> bool:
        """As :meth:`TokenSeparators.includes`."""
        return position % self.interval == 0

    def mask(
        self, token_ids: Sequence[int], first: int = 0, previous: int | None = None
    ) -> BoolArray:
        """As :meth:`TokenSeparators.mask`."""
        mask: BoolArray = np.arange(first, first + len(token_ids)) % self.interval == 0
        return mask


Separators = TokenSeparators | IntervalSeparators
