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

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.visibility import IntArray


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


def num_entries(max_tokens: int) -> int:
    """Entries that a request needs beyond its compact length.

    Args:
        max_tokens: most tokens that a step proposes, the certain one included; 0: none.
    """
    return 2 * max_tokens


def propose(
    index: SeparatorIndex,
    last: Staged | None,
    start: int,
    num_drafts: int,
    max_tokens: int,
) -> tuple[Commit | None, Staged | None]:
    """Follow the proposals of a request through a step.

    Args:
        index: of the request, with its tokens up to start - window taken in.
        last: what the step before proposed.
        start: tokens computed before the step: the proposals before it were right.
        num_drafts: that the step proposes behind its certain token.
        max_tokens: most tokens that a step may propose.

    Returns:
        What the step commits first, and where it leaves its own proposals. Without drafts its
        token is certain, and before the window is full no entry is overwritten: both go to the
        cache directly, as in stock vLLM.
    """
    policy = index.policy
    num_spilled = index.num_spilled(start)
    commit = staged = None
    if last is not None:
        before = index.num_spilled(last.position)
        commit = Commit(last, start, before, index.positions(before, num_spilled))
    if num_drafts and start + 1 + num_drafts > policy.num_dense:
        entry = layout.compact_length(policy, start, num_spilled) + max_tokens
        staged = Staged(start, entry)
    return commit, staged
