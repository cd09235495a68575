"""A step for rows that read no more than their cache: one token, or all inside a + n."""

from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.visibility import BatchPolicy, BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class Spills:
    """Copies ring -> tail that must happen before anything else is written.

    Attributes:
        rows: [num_spills], the request of each copy.
        source: [num_spills], compact index in the ring.
        target: [num_spills], compact index in the tail.
    """

    rows: IntArray
    source: IntArray
    target: IntArray


def compact_lengths(
    policy: BatchPolicy, end: IntArray, num_spilled: IntArray, spills: BoolArray
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
    policy: BatchPolicy, start: IntArray, num_spilled: IntArray, spills: BoolArray
) -> Spills:
    """The copies that decode rows need: the token at ``start`` overwrites one at start - n.

    Arguments as in :func:`compact_lengths`; ``start`` is the position of the new token.
    """
    rows = np.flatnonzero(spills)
    if policy.max_separators == 0:
        rows = rows[:0]
    policy = policy.of_rows(rows)
    source = layout.ring_index(policy, start[rows])
    return Spills(rows, source, layout.tail_index(policy, num_spilled[rows]))
