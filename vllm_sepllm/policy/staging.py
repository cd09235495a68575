"""Tokens that a step only proposes: their KV waits beside the cache until the next step.

Speculative decoding computes a certain token and drafts behind it. Writing drafts to the ring
would overwrite entries that are still read if the drafts are wrong, so all of them go to staging
entries behind the request's last entry. The next step knows how many were right: it *commits*
those, before anything else. The entries of a request are then

    [0, L)          as in policy/layout.py, L its compact length when the step begins
    [L, L + m)      left free, into which the commit may grow
    [L + m, L + 2m) staging, m = 1 + the most drafts a step
"""

from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.visibility import IntArray, Policy


@dataclass(frozen=True, slots=True)
class Staged:
    """What the last step of a request proposed.

    Attributes:
        position: of its first token.
        entry: compact index where that token's KV waits; the others follow.
    """

    position: int
    entry: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Proposed tokens that turned out right.

    Attributes:
        staged: where they wait.
        end: position after the last of them.
        num_spilled: separators that left the window before ``staged.position``.
        separators: [num_leaving], positions of those that leave it now, ascending.
    """

    staged: Staged
    end: int
    num_spilled: int
    separators: IntArray


@dataclass(frozen=True, slots=True)
class CommitMoves:
    """The copies of a commit; spills come first, all sources of a kind before its targets.

    Attributes:
        spill_source: [num_spills], compact index in the ring.
        spill_target: [num_spills], compact index in the tail.
        source: [num_tokens], compact index in staging.
        target: [num_tokens], compact index among the initial tokens or in the ring.
    """

    spill_source: IntArray
    spill_target: IntArray
    source: IntArray
    target: IntArray


def num_entries(max_tokens: int) -> int:
    """Entries that a request needs beyond its compact length.

    Args:
        max_tokens: most tokens that a step proposes, the certain one included; 0: none.
    """
    return 2 * max_tokens


def stage(policy: Policy, start: int, num_spilled: int, max_tokens: int) -> Staged:
    """Where a step that begins at position ``start`` leaves its proposals."""
    return Staged(start, layout.compact_length(policy, start, num_spilled) + max_tokens)


def commit_moves(policy: Policy, commit: Commit) -> CommitMoves:
    """What a commit copies. The window must be longer than the commit."""
    separators = commit.separators
    rank = commit.num_spilled + np.arange(len(separators))
    if policy.max_separators is not None:
        still = rank >= commit.num_spilled + len(separators) - policy.max_separators
        separators, rank = separators[still], rank[still]
    position = np.arange(commit.staged.position, commit.end)
    return CommitMoves(
        spill_source=layout.ring_index(policy, separators),
        spill_target=layout.tail_index(policy, rank) if len(rank) else rank,
        source=commit.staged.entry + position - commit.staged.position,
        target=layout.ring_index(policy, position),
    )
