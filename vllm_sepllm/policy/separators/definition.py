"""What makes a token a separator: its id, or its position."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_sepllm.policy.visibility import BoolArray


@dataclass(frozen=True)  # no slots: the table is made once, when it is first needed
class TokenSeparators:
    """Tokens with one of these ids are separators."""

    token_ids: tuple[int, ...]

    @cached_property
    def _table(self) -> BoolArray:
        # [highest separator + 2]: whether each token id is one; higher ids read the last entry
        table = np.zeros(max(self.token_ids, default=-1) + 2, dtype=np.bool_)
        table[list(self.token_ids)] = True
        return table

    def includes(self, token_id: int, position: int) -> bool:
        """Whether the token at ``position`` is a separator."""
        return bool(self._table[min(token_id, len(self._table) - 1)])

    def mask(self, token_ids: Sequence[int], first: int = 0) -> BoolArray:
        """:meth:`includes` for the tokens from position ``first`` on, [num_tokens]."""
        mask: BoolArray = self._table.take(np.asarray(token_ids, dtype=np.int64), mode="clip")
        return mask


@dataclass(frozen=True, slots=True)
class IntervalSeparators:
    """Tokens at positions that ``interval`` divides are separators, whatever they are (FixLLM)."""

    interval: int

    def includes(self, token_id: int, position: int) -> bool:
        """As :meth:`TokenSeparators.includes`."""
        return position % self.interval == 0

    def mask(self, token_ids: Sequence[int], first: int = 0) -> BoolArray:
        """As :meth:`TokenSeparators.mask`."""
        mask: BoolArray = np.arange(first, first + len(token_ids)) % self.interval == 0
        return mask


Separators = TokenSeparators | IntervalSeparators
