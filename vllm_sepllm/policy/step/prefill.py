"""A prefill chunk, and what the cache keeps of it afterwards.

A chunk [start, end) of one request attends first, to the entries of its cache as they were when
the step began and to its own keys; only then are the survivors written. Keys are numbered along
the concatenation ``[cache entries 0..num_cached) + chunk tokens start..end)``.
"""

from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.visibility import IntArray, Policy


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's share of a step.

    Attributes:
        policy: a, n and s.
        start: tokens computed before the step.
        end: tokens computed after it.
        num_spilled: separators that left the window before the step.
        separators: positions of the separators in [max(a, start - n), end), ascending.
    """

    policy: Policy
    start: int
    end: int
    num_spilled: int
    separators: IntArray

    @property
    def num_cached(self) -> int:
        """Compact length when the step begins."""
        return layout.compact_length(self.policy, self.start, self.num_spilled)

    def key_numbers(self, positions: IntArray) -> IntArray:
        """Key numbers of initial tokens, of positions in the ring and in the chunk."""
        in_chunk = self.num_cached + positions - self.start
        return np.where(
            positions >= self.start, in_chunk, layout.ring_index(self.policy, positions)
        )

    @property
    def num_spilled_after(self) -> int:
        """Separators that have left the window when the step ends."""
        left = layout.num_left_window(self.policy, self.end)
        return self.num_spilled + int(np.searchsorted(self.separators, left))


@dataclass(frozen=True, slots=True)
class Survivors:
    """What a cache keeps of a chunk, or a checkpoint of cache and chunk. Copies precede writes.

    Attributes:
        copy_source: [num_copies], compact index in the cache as the step begins: of a separator
            that leaves the ring, or of what a checkpoint holds.
        copy_target: [num_copies], its compact index afterwards, or in the checkpoint.
        tokens: [num_writes], chunk tokens that are written, counted from the start of the chunk.
        target: [num_writes], their compact indices.
    """

    copy_source: IntArray
    copy_target: IntArray
    tokens: IntArray
    target: IntArray


def survivors(chunk: Chunk) -> Survivors:
    """What is left of the chunk for later queries, and where it goes."""
    policy, start, end = chunk.policy, chunk.start, chunk.end
    left = layout.num_left_window(policy, end)
    leaving = chunk.separators[: np.searchsorted(chunk.separators, left)]
    leaving, tail = layout.spilled(policy, chunk.num_spilled, leaving)
    from_ring = leaving < start

    position = np.arange(start, end)
    stays = (position < policy.initial_tokens) | (position >= left)
    dense = position[stays]
    return Survivors(
        copy_source=layout.ring_index(policy, leaving[from_ring]),
        copy_target=tail[from_ring],
        tokens=np.concatenate([dense, leaving[~from_ring]]) - start,
        target=np.concatenate([layout.ring_index(policy, dense), tail[~from_ring]]),
    )
