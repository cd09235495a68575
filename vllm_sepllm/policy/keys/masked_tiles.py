"""Query tiles of a prefill chunk: the keys that each reads, and a mask over some of them.

For attention by dense products, as on CPUs where vLLM's own kernel cannot do it. Keys are numbered
as in :mod:`vllm_sepllm.policy.step.prefill`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step.prefill import Chunk
from vllm_sepllm.policy.visibility import BoolArray, IntArray


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

    left = min(start, layout.num_left_window(policy, start))
    known = np.concatenate([np.arange(min(start, policy.initial_tokens)), np.arange(left, end)])
    position[chunk.key_numbers(known)] = known

    old = layout.tail_ranks(policy, chunk.num_spilled)
    at = layout.tail_index(policy, old)
    rank[at] = old
    is_separator[at] = True
    at = chunk.key_numbers(chunk.separators)
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
    lowest = oldest - policy.bound

    is_far_kept = keys.is_separator & (keys.rank >= lowest[0, 0])
    is_near = keys.position > first - policy.window
    is_read = (keys.position < last) & (keys.is_initial | is_near | is_far_kept)
    # keys before the first query that the last one still reads: all queries read them
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
