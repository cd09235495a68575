"""What makes a token a separator: its id and the id before it, or its position.

``previous`` is the id of the token before the first one that is asked for; None: there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_sepllm.policy.visibility import BoolArray

# bits of a token id in the table of TokenSeparators
_SEPARATOR, _AFTER_CLOSER, _CLOSER = 1, 2, 4


@dataclass(frozen=True)  # no slots: the table is made once, when it is first needed
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
    def _table(self) -> npt.NDArray[np.uint8]:
        # [highest id + 2]: bits of each token id; higher ids read the last entry
        highest = max((*self.token_ids, *self.line_breaks, *self.closers), default=-1)
        table = np.zeros(highest + 2, dtype=np.uint8)
        table[list(self.token_ids)] |= _SEPARATOR
        table[list(self.line_breaks)] |= _AFTER_CLOSER
        table[list(self.closers)] |= _CLOSER
        return table

    def _bits(self, token_id: int) -> int:
        return int(self._table[min(token_id, len(self._table) - 1)])

    def includes(self, token_id: int, position: int, previous: int | None) -> bool:
        """Whether the token at ``position`` is a separator."""
        bits = self._bits(token_id)
        if bits & _AFTER_CLOSER and previous is not None and self._bits(previous) & _CLOSER:
            return True
        return bool(bits & _SEPARATOR)

    def mask(
        self, token_ids: Sequence[int], first: int = 0, previous: int | None = None
    ) -> BoolArray:
        """:meth:`includes` for the tokens from position ``first`` on, [num_tokens]."""
        bits = self._table.take(np.asarray(token_ids, dtype=np.int64), mode="clip")
        mask: BoolArray = (bits & _SEPARATOR) != 0
        if self.line_breaks and len(bits):
            follows_closer = np.empty_like(mask)
            follows_closer[0] = previous is not None and bool(self._bits(previous) & _CLOSER)
            follows_closer[1:] = (bits[:-1] & _CLOSER) != 0
            mask |= follows_closer & ((bits & _AFTER_CLOSER) != 0)
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
