"""A chunk of a prefill whose separators are a list of flags, and what the cache before it holds."""

import numpy as np

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step.prefill import Chunk
from vllm_sepllm.policy.visibility import Policy


def make_chunk(policy: Policy, is_separator: list[bool], start: int) -> Chunk:
    far = max(policy.initial_tokens, start - policy.window)
    separators = [p for p in range(far, len(is_separator)) if is_separator[p]]
    spilled = sum(is_separator[policy.initial_tokens : far])
    return Chunk(policy, start, len(is_separator), spilled, np.array(separators, dtype=np.int64))


def positions_of(chunk: Chunk, is_separator: list[bool]) -> dict[int, int]:
    """Key number -> position, by writing the tokens before the chunk one at a time."""
    policy, held, rank = chunk.policy, {}, 0
    for i in range(chunk.start):
        left = i - policy.window
        if left >= policy.initial_tokens and is_separator[left]:
            held[int(layout.tail_index(policy, np.array(rank)))] = left
            rank += 1
        held[int(layout.ring_index(policy, np.array(i)))] = i
    if (left := chunk.start - policy.window) >= policy.initial_tokens and not is_separator[left]:
        del held[int(layout.ring_index(policy, np.array(left)))]
    numbers = range(chunk.num_cached, chunk.num_cached + chunk.end - chunk.start)
    return held | dict(zip(numbers, range(chunk.start, chunk.end), strict=True))
