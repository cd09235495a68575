"""States of a text's tokens and lengths of its cache, step by step: for pictures and budgets."""

from enum import IntEnum

import numpy as np

from vllm_sepllm.policy.layout import compact_lengths, num_tail
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy


class State(IntEnum):
    """A token as the query at some position finds it; assets/page.js uses the same numbers."""

    INITIAL = 0
    SEPARATOR = 1
    WINDOW = 2
    FORGOTTEN = 3
    FUTURE = 4


def kept_lengths(policy: Policy, is_separator: BoolArray) -> IntArray:
    """Entries that the cache holds after each position: [num_tokens].

    Args:
        policy: a, n and s.
        is_separator: [num_tokens], whether each token of the request is a separator.
    """
    num_tokens = len(is_separator)
    counted = is_separator & (np.arange(num_tokens) >= policy.initial_tokens)
    # num_spilled after position i: separators at positions in [a, i-n]
    num_spilled = np.concatenate([np.zeros(policy.window, np.int64), np.cumsum(counted)])
    return compact_lengths(policy, np.arange(1, num_tokens + 1), num_spilled[:num_tokens])


def token_states(policy: Policy, is_separator: BoolArray, query: int) -> IntArray:
    """The :class:`State` of each token for the query at a position: [num_tokens].

    A separator among the initial tokens or in the window counts as one of those.
    """
    position = np.arange(len(is_separator))
    counted = is_separator & (position >= policy.initial_tokens)
    rank: IntArray = np.cumsum(counted) - counted
    num_left = int(counted[: max(0, query - policy.window + 1)].sum())
    oldest = num_left - int(num_tail(policy, num_left))
    states = np.where(counted & (rank >= oldest), State.SEPARATOR, State.FORGOTTEN)
    states = np.where(query - position < policy.window, State.WINDOW, states)
    states = np.where(position < policy.initial_tokens, State.INITIAL, states)
    result: IntArray = np.where(position > query, State.FUTURE, states).astype(np.int64)
    return result
