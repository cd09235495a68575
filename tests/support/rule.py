"""The rule of one query in scalars, from the paper's formula; shares no code with the package.

With 0-based positions, query i reads key j <= i if j < a, or i - j < n, or j is among the latest s
separators of those between. A policy is anything that has a, n and s by their names.
"""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Protocol


class Numbers(Protocol):
    """a, n and s."""

    @property
    def initial_tokens(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def max_separators(self) -> int | None: ...


def visible(policy: Numbers, is_separator: Sequence[bool | int], query: int) -> list[int]:
    """Positions that the token at position ``query`` reads, ascending."""
    a, n, s = policy.initial_tokens, policy.window, policy.max_separators
    near = [*range(min(a, query + 1)), *range(max(a, query - n + 1), query + 1)]
    between = spilled(policy, is_separator, query + 1)
    kept = between if s is None else between[max(0, len(between) - s) :]
    return sorted(near + kept)


class Renumbered(Numbers, Protocol):
    """a, n, s and L."""

    @property
    def max_position(self) -> int | None: ...


def read_positions(
    policy: Renumbered, is_separator: Sequence[bool | int], num_tokens: int
) -> Iterator[dict[int, int]]:
    """Query by query, position in the text -> position in the cache of each token that it reads.

    Whenever the next position would be L, what is kept is numbered anew in the order of the text.
    """
    positions: dict[int, int] = {}
    following = 0
    for query in range(num_tokens):
        if following == policy.max_position:
            kept = visible(policy, is_separator, query - 1)
            positions = {key: position for position, key in enumerate(kept)}
            following = len(kept)
        positions[query] = following
        following += 1
        yield {key: positions[key] for key in visible(policy, is_separator, query)}


def spilled(policy: Numbers, is_separator: Sequence[bool | int], num_tokens: int) -> list[int]:
    """Separators behind the window of the last of ``num_tokens`` tokens, bounded or not."""
    first = policy.initial_tokens
    last = max(first, num_tokens - policy.window)
    return [*compress(range(first, last), is_separator[first:last])]


def num_kept(policy: Numbers, is_separator: Sequence[bool | int], num_tokens: int) -> int:
    """Entries that a cache of ``num_tokens`` tokens holds: what its last token reads."""
    return len(visible(policy, is_separator, num_tokens - 1))
