"""A step for rows that read no more than their cache: one token, or all inside a + n."""

from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.visibility import AnyPolicy, BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class Moves:
    """Copies of entries inside the caches of a batch; all are read before any is written.

    Attributes:
        rows: [num_moves], row of the batch.
        source: [num_moves], compact index.
        target: [num_moves], compact index.
    """

    rows: IntArray
    source: IntArray
    target: IntArray


def compact_lengths(
    policy: AnyPolicy, end: IntArray, num_spilled: IntArray, spills: BoolArray
) -> IntArray:
    """Compact length of each row after the step, [num_rows].

    Args:
        policy: a, n and s of the rows.
        end: [num_rows], tokens computed after the step.
        num_spilled: [num_rows], separators that left the window before the step.
        spills: [num_rows], whether one more leaves in it.
    """
    dense = np.minimum(end, policy.num_dense)
    return dense + layout.num_tail(policy, num_spilled + spills)


def spill_copies(
    policy: AnyPolicy, entry: IntArray, num_spilled: IntArray, spills: BoolArray
) -> Moves:
    """Copies ring -> tail, which come before any write: a new token overwrites the one that leaves.

    Arguments as in :func:`compact_lengths`; ``entry`` is the compact index of the new token.
    """
    rows = spills.nonzero()[0]  # faster than flatnonzero on so few elements
    if len(rows) == 0 or policy.max_separators == 0:
        return Moves(rows[:0], rows[:0], rows[:0])
    return Moves(rows, entry[rows], layout.tail_index(policy, num_spilled)[rows])
