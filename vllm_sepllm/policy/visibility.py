"""The SepLLM rule: which keys a query may read, written once as inequalities.

Source: SepLLM (arXiv:2412.12094), the per-token mask of its fundamental design. With 0-based
positions over the tokens of one request,

    visible(i, j)  =  j <= i  and  ( j < a  or  i - j < n  or  token j is a separator )

where a is the number of initial tokens and n the window, the query included. ``max_separators``
bounds the last term: of the separators that left the window only the latest s stay visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

# as a bound of separators; with any number of them it fits the kernels' 32 bits
UNBOUNDED = 2**30


@dataclass(frozen=True, slots=True)
class Policy:
    """What a query may read, apart from which tokens are separators.

    Attributes:
        initial_tokens: a, tokens at the start of the request that every query reads.
        window: n, most recent tokens that a query reads, itself included.
        max_separators: s, separators older than the window that stay visible; None: all.
        max_position: L, where the positions of kept tokens are renumbered (policy/epochs.py); what
            a query reads does not depend on it. None: positions are those in the text.
    """

    initial_tokens: int
    window: int
    max_separators: int | None = None
    max_position: int | None = None

    def __post_init__(self) -> None:
        if self.initial_tokens < 0:
            raise ValueError(f"initial_tokens must be >= 0, got {self.initial_tokens}")
        if self.window < 1:
            raise ValueError(f"window must be >= 1 (a query reads itself), got {self.window}")
        if self.max_separators is not None and self.max_separators < 0:
            raise ValueError(f"max_separators must be >= 0 or None, got {self.max_separators}")

    @property
    def bound(self) -> int:
        """s as a number: more separators than any request has, if none has to go."""
        return UNBOUNDED if self.max_separators is None else self.max_separators

    @property
    def num_dense(self) -> int:
        """a + n: up to here every token is kept and the layout is vLLM's own."""
        return self.initial_tokens + self.window


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """The policies of the rows of a batch: a request may have its own a and n, s is the engine's.

    Attributes:
        initial_tokens: [num_rows].
        window: [num_rows].
        max_separators: as in :class:`Policy`.
    """

    initial_tokens: IntArray
    window: IntArray
    max_separators: int | None = None

    @classmethod
    def of(cls, policies: Sequence[Policy], engine: Policy) -> "BatchPolicy":
        """The policies of requests that an engine with the policy ``engine`` serves."""
        initial_tokens = np.array([policy.initial_tokens for policy in policies], dtype=np.int64)
        window = np.array([policy.window for policy in policies], dtype=np.int64)
        return cls(initial_tokens, window, engine.max_separators)

    @property
    def bound(self) -> int:
        """As in :class:`Policy`."""
        return UNBOUNDED if self.max_separators is None else self.max_separators

    @property
    def num_dense(self) -> IntArray:
        """[num_rows], as in :class:`Policy`."""
        return self.initial_tokens + self.window

    def of_rows(self, rows: IntArray | slice) -> "BatchPolicy":
        """The policies of some of the rows; with the row of each token, one for each token."""
        return BatchPolicy(self.initial_tokens[rows], self.window[rows], self.max_separators)

    def of_row(self, row: int) -> Policy:
        """The policy of one row."""
        return Policy(int(self.initial_tokens[row]), int(self.window[row]), self.max_separators)


# one policy for all elements of an array, or one for each
AnyPolicy = Policy | BatchPolicy


def visible_mask(policy: Policy, is_separator: BoolArray) -> BoolArray:
    """The rule for all pairs at once: [num_tokens, num_tokens], rows are queries.

    Quadratic in memory: for oracles and pictures, never for serving.
    """
    num_tokens = len(is_separator)
    query = np.arange(num_tokens)[:, None]
    key = np.arange(num_tokens)[None, :]
    is_far = (key >= policy.initial_tokens) & (query - key >= policy.window)
    kept = ~is_far | is_separator[None, :]
    if policy.max_separators is not None:
        counted = is_separator & (np.arange(num_tokens) >= policy.initial_tokens)
        # rank of a separator: separators at positions in [a, j); num_left: those in [a, i-n]
        rank: IntArray = np.cumsum(counted) - counted
        num_inside = min(policy.window, num_tokens)
        num_left = np.concatenate([np.zeros(num_inside, np.int64), np.cumsum(counted)])
        too_old = rank[None, :] < num_left[:num_tokens, None] - policy.max_separators
        kept &= ~(is_far & too_old)
    mask: BoolArray = kept & (key <= query)
    return mask
