"""A prefill chunk: what each query tile reads, and what the cache keeps of it afterwards.

A chunk [start, end) of one request attends first, to the entries of its cache as they were when
the step began and to its own keys; only then are the survivors written. Keys are numbered along
the concatenation ``[cache entries 0..num_cached) + chunk tokens start..end)``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy


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

    @property
    def num_spilled_after(self) -> int:
        """Separators that have left the window when the step ends."""
        left = layout.num_left_window(self.policy, self.end)
        return self.num_spilled + int(np.searchsorted(self.separators, left))


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Consecutive queries of a chunk and the keys that at least one of them reads.

    Attributes:
        first: first query, counted from the start of the chunk.
        last: end of the queries, exclusive.
        keys: [num_keys], key numbers; those that every query reads come first.
        hidden: [last - first, num_partial], for the last num_partial keys: True where a query must
            not read the key. At most about two tiles wide, however long the request is.
    """

    first: int
    last: int
    keys: IntArray
    hidden: BoolArray


@dataclass(frozen=True, slots=True)
class Survivors:
    """What the cache keeps of a chunk. Copies come before writes.

    Attributes:
        copy_source: [num_copies], compact index in the ring of a separator that leaves the window.
        copy_target: [num_copies], its compact index in the tail.
        tokens: [num_writes], chunk tokens that are written, counted from the start of the chunk.
        target: [num_writes], their compact indices.
    """

    copy_source: IntArray
    copy_target: IntArray
    tokens: IntArray
    target: IntArray


@dataclass(frozen=True, slots=True)
class _Keys:
    """Per key number: what decides who reads it."""

    position: IntArray
    is_initial: BoolArray
    is_separator: BoolArray
    rank: IntArray  # among the separators at positions >= a; meaningless elsewhere


def _keys(chunk: Chunk) -> _Keys:
    policy, start, end = chunk.policy, chunk.start, chunk.end
    num_cached, num_keys = chunk.num_cached, chunk.num_cached + end - start
    # tail entries are older than the window of every query of the chunk; which position exactly
    # does not matter
    position = np.full(num_keys, start - policy.window - 1, dtype=np.int64)
    rank = np.zeros(num_keys, dtype=np.int64)
    is_separator = np.zeros(num_keys, dtype=np.bool_)

    cached = np.arange(min(start, policy.initial_tokens))
    position[cached] = cached
    in_ring = np.arange(layout.num_left_window(policy, start), start)
    position[layout.ring_index(policy, in_ring)] = in_ring
    position[num_cached:] = np.arange(start, end)

    tail = layout.num_tail(policy, chunk.num_spilled)
    if tail:
        old = np.arange(chunk.num_spilled - tail, chunk.num_spilled)
        at = layout.tail_index(policy, old)
        rank[at] = old
        is_separator[at] = True
    of_chunk = chunk.separators >= start
    at = np.where(
        of_chunk,
        num_cached + chunk.separators - start,
        layout.ring_index(policy, chunk.separators),
    )
    rank[at] = chunk.num_spilled + np.arange(len(at))
    is_separator[at] = True
    is_initial = (position >= 0) & (position < policy.initial_tokens)
    is_initial[policy.num_dense : num_cached] = False
    return _Keys(position, is_initial, is_separator, rank)


def query_tiles(chunk: Chunk, tile_size: int) -> Iterator[QueryTile]:
    """Split the chunk's queries into tiles of ``tile_size``; each lists the keys it can see.

    One at a time: the masks of a long chunk together take more memory than its keys.
    """
    keys = _keys(chunk)
    for first in range(chunk.start, chunk.end, tile_size):
        last = min(first + tile_size, chunk.end)
        yield _query_tile(chunk, keys, first, last)


def _query_tile(chunk: Chunk, keys: _Keys, first: int, last: int) -> QueryTile:
    policy = chunk.policy
    query = np.arange(first, last)[:, None]
    oldest = chunk.num_spilled + np.searchsorted(
        chunk.separators, query - policy.window, side="right"
    )
    # lowest rank that a far separator needs to be visible, [num_queries, 1]
    lowest = np.zeros_like(oldest) if policy.max_separators is None else oldest
    lowest = lowest - (policy.max_separators or 0)

    is_far_kept = keys.is_separator & (keys.rank >= lowest[0, 0])
    is_near = keys.position > first - policy.window
    is_read = (keys.position < last) & (keys.is_initial | is_near | is_far_kept)
    # what the first query has before it and the last one still reads, all read
    stays = (keys.position >= last - policy.window) | (
        keys.is_separator & (keys.rank >= lowest[-1, 0])
    )
    is_full = is_read & (keys.position <= first) & (keys.is_initial | stays)
    partial = np.flatnonzero(is_read & ~is_full)
    position = keys.position[partial]
    far_kept = keys.is_separator[partial] & (keys.rank[partial] >= lowest)
    visible = (position <= query) & (
        keys.is_initial[partial] | (query - position < policy.window) | far_kept
    )
    return QueryTile(
        first - chunk.start,
        last - chunk.start,
        np.concatenate([np.flatnonzero(is_full), partial]),
        ~visible,
    )


def survivors(chunk: Chunk) -> Survivors:
    """What is left of the chunk for later queries, and where it goes."""
    policy, start, end = chunk.policy, chunk.start, chunk.end
    left = layout.num_left_window(policy, end)
    leaving = chunk.separators[: np.searchsorted(chunk.separators, left)]
    rank = chunk.num_spilled + np.arange(len(leaving))
    if policy.max_separators is not None:
        still = rank >= chunk.num_spilled + len(leaving) - policy.max_separators
        leaving, rank = leaving[still], rank[still]
    tail = layout.tail_index(policy, rank) if len(rank) else rank
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
