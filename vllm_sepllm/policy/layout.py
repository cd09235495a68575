"""Where the KV of a kept token lives: the compact index space of one request.

    [0, a)           the initial tokens
    [a, a+n)         the ring: position i >= a sits at a + (i - a) mod n
    [a+n, a+n+k)     the tail: the k-th separator that left the window, at a + n + k mod s
                     (a + n + k if their number is not bounded)

Writing token i overwrites token i-n in the ring. If token i-n is a separator its KV is first
copied ("spilled") to the tail. Positions index the request, compact indices index its cache.
"""

from typing import TypeVar

import numpy as np

from vllm_sepllm.policy.visibility import AnyPolicy, IntArray, Policy

Index = TypeVar("Index", int, IntArray)


def num_tail(policy: AnyPolicy, num_spilled: Index) -> Index:
    """Entries in the tail once ``num_spilled`` separators have left the window."""
    if isinstance(num_spilled, int):
        return min(num_spilled, policy.bound)
    return np.minimum(num_spilled, policy.bound)


def compact_length(policy: Policy, num_tokens: int, num_spilled: int) -> int:
    """Entries the cache holds after ``num_tokens`` tokens, ``num_spilled`` of them spilled."""
    return min(num_tokens, policy.num_dense) + num_tail(policy, num_spilled)


def compact_lengths(policy: AnyPolicy, num_tokens: IntArray, num_spilled: IntArray) -> IntArray:
    """:func:`compact_length` for each element; a row of ``policy`` for each, if it has rows."""
    return np.minimum(num_tokens, policy.num_dense) + num_tail(policy, num_spilled)


def max_compact_length(policy: Policy, num_tokens: int) -> int:
    """The most a request of ``num_tokens`` can hold: every token could be a separator."""
    return compact_length(policy, num_tokens, max(0, num_tokens - policy.num_dense))


def ring_index(policy: AnyPolicy, position: IntArray) -> IntArray:
    """Compact index of a token that is an initial one or inside the window.

    A row of ``policy`` for each position, if it has rows.
    """
    a = policy.initial_tokens
    return np.where(position < a, position, a + (position - a) % policy.window)


def tail_index(policy: AnyPolicy, rank: IntArray) -> IntArray:
    """Compact index of the separator that left the window as number ``rank`` (from 0).

    A row of ``policy`` for each rank, if it has rows.
    With ``max_separators`` 0 nothing has a place in the tail: there must be no rank.
    """
    return policy.num_dense + rank % policy.bound


def tail_ranks(policy: Policy, num_spilled: int) -> IntArray:
    """Ranks of the separators in the tail once ``num_spilled`` have left the window, ascending."""
    return np.arange(num_spilled - num_tail(policy, num_spilled), num_spilled)


def spilled(policy: Policy, num_spilled: int, separators: IntArray) -> tuple[IntArray, IntArray]:
    """Positions of the separators that a step leaves in the tail, and their compact indices.

    Args:
        policy: a, n and s.
        num_spilled: separators that left the window before the step.
        separators: positions of those that leave it now, ascending.
    """
    first = len(separators) - num_tail(policy, len(separators))
    rank = num_spilled + np.arange(first, len(separators))
    return separators[first:], tail_index(policy, rank)


def num_left_window(policy: Policy, num_tokens: int) -> int:
    """First position that still sits in the ring after ``num_tokens`` tokens.

    Tokens at positions in [a, this) have left the window; their separators are spilled.
    """
    return max(policy.initial_tokens, num_tokens - policy.window)
