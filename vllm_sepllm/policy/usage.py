"""Sums over requests of what is kept, and of what full attention would hold, for the metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_sepllm.policy.layout import compact_lengths
from vllm_sepllm.policy.visibility import AnyPolicy, IntArray


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over requests of one policy.

    Attributes:
        logical_tokens: computed tokens; full attention would hold each.
        kept_tokens: compact lengths.
        blocks_saved: KV blocks of the logical tokens less those of the kept ones.
    """

    logical_tokens: int
    kept_tokens: int
    blocks_saved: int


def label(window: int, max_model_len: int) -> str:
    """A policy for people: its window, or ``full`` where no token ever leaves it."""
    return "full" if window >= max_model_len else str(window)


def usage(
    policy: AnyPolicy, num_tokens: IntArray, num_spilled: IntArray, block_sizes: Sequence[int]
) -> Usage:
    """The sums.

    Args:
        policy: a, n and s, of all requests or of each.
        num_tokens: [num_requests], computed tokens of each.
        num_spilled: [num_requests], separators that left the window in them.
        block_sizes: tokens of a block, for each KV cache group with this policy.
    """
    kept = compact_lengths(policy, num_tokens, num_spilled)
    saved = sum(int((-(-num_tokens // size) + -kept // size).sum()) for size in block_sizes)
    return Usage(int(num_tokens.sum()), int(kept.sum()), saved)
