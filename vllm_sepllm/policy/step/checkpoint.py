"""The state of a compact cache at a position, kept for requests that begin with the same tokens.

Ring entries are overwritten, so a cached prefix is a *checkpoint*: the entries [0, compact length)
after its tokens. Blocks that no continuation writes are shared, the others are copied, both when
the checkpoint is taken and when a request starts from it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step import prefill
from vllm_sepllm.policy.visibility import Policy


def written_blocks(
    policy: Policy,
    block_size: int,
    num_tokens: int,
    num_spilled: int,
    *,
    may_wrap: bool,
    stays_dense: bool = False,
) -> list[int]:
    """Blocks of a state that a request going on from it would write, ascending.

    The ring, and the last block if it is not full. If the request may spill more than
    max_separators, the tail is a ring too. If it ends within a + n tokens, as with full attention,
    the ring never goes round. Full blocks of initial tokens are never written again.
    """
    length = layout.compact_length(policy, num_tokens, num_spilled)

    def is_written(block: int) -> bool:
        first, end = block * block_size, (block + 1) * block_size
        in_ring = first < policy.num_dense and end > policy.initial_tokens
        in_tail = end > policy.num_dense
        goes_round = (in_ring and not stays_dense) or (in_tail and may_wrap)
        return goes_round or end > length

    return [i for i in range(-(-length // block_size)) if is_written(i)]


def overwritten_blocks(policy: Policy, block_size: int, start: int, end: int) -> list[int]:
    """Blocks in which the step [start, end) writes over tokens of the ring, ascending."""
    a, n = policy.initial_tokens, policy.window
    positions = range(max(start, policy.num_dense, end - n), end)
    return sorted({(a + (p - a) % n) // block_size for p in positions})


def checkpoint_parts(
    chunk: prefill.Chunk, position: int, block_size: int, blocks: list[int]
) -> prefill.Survivors:
    """What ``blocks`` of the state after ``position`` tokens hold, start < position <= end."""
    until = np.searchsorted(chunk.separators, position)
    part = replace(chunk, end=position, separators=chunk.separators[:until])
    kept = prefill.survivors(part)
    length = layout.compact_length(chunk.policy, position, part.num_spilled_after)

    # an entry is as it was unless the step copies or writes it
    source = np.arange(length)
    source[kept.copy_target] = kept.copy_source
    is_written = np.zeros(length, dtype=np.bool_)
    is_written[kept.target] = True

    is_own = np.zeros(-(-length // block_size), dtype=np.bool_)
    is_own[blocks] = True
    is_own_entry = np.repeat(is_own, block_size)[:length]
    copied = np.flatnonzero(is_own_entry & ~is_written)
    written = is_own_entry[kept.target]
    return prefill.Survivors(source[copied], copied, kept.tokens[written], kept.target[written])


def checkpoint_positions(
    start: int, end: int, *, interval: int, wanted: Sequence[int]
) -> list[int]:
    """Positions in (start, end] at which a step leaves a checkpoint, ascending.

    Args:
        start: tokens computed before the step.
        end: tokens computed after it.
        interval: one at every multiple of it.
        wanted: further positions, taken if the step passes them.
    """
    regular = range((start // interval + 1) * interval, end + 1, interval)
    return sorted({*regular, *(p for p in wanted if start < p <= end)})


def first_of_each(positions: Iterable[int], distance: int) -> list[int]:
    """The first of the ascending positions in each stretch of ``distance`` tokens.

    A request that goes on from another position of a stretch computes fewer than ``distance``
    tokens once more, if it starts from the first one.
    """
    return [next(group) for _, group in groupby(positions, lambda p: (p - 1) // distance)]
