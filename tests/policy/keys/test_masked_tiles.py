"""Masked tiles list what their queries read, and no more."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.keys.masked_tiles import query_tiles
from vllm_sepllm.policy.step.prefill import Chunk
from vllm_sepllm.policy.visibility import Policy, visible_mask


def positions(chunk: Chunk, is_separator: np.ndarray) -> list[int]:
    """Of each key, the cached ones by what is visible or about to leave as the chunk starts."""
    policy, start = chunk.policy, chunk.start
    held = [-1] * chunk.num_cached
    for i in range(min(start, policy.initial_tokens)):
        held[i] = i
    for i in range(layout.num_left_window(policy, start), start):
        held[int(layout.ring_index(policy, np.array(i)))] = i
    left = np.arange(policy.initial_tokens, start - policy.window)
    spilled = left[is_separator[left]]
    for rank in range(len(spilled) - layout.num_tail(policy, len(spilled)), len(spilled)):
        held[int(layout.tail_index(policy, np.array(rank)))] = int(spilled[rank])
    return [*held, *range(start, chunk.end)]


@given(
    policy=st.builds(
        Policy,
        initial_tokens=st.integers(0, 6),
        window=st.integers(1, 17),
        max_separators=st.none() | st.integers(0, 6),
    ),
    is_separator=st.lists(st.booleans(), min_size=1, max_size=90).map(np.array),
    start=st.floats(0, 1),
    tile_size=st.sampled_from([1, 5, 16, 128]),
)
def test_tiles_list_what_their_queries_read(
    policy: Policy, is_separator: np.ndarray, start: float, tile_size: int
) -> None:
    """Also chunks inside a + n, which come to this only behind another request's chunk."""
    first, end = int(start * (len(is_separator) - 1)), len(is_separator)
    left = layout.num_left_window(policy, first)
    separators = np.flatnonzero(is_separator)
    num_spilled = int(is_separator[policy.initial_tokens : left].sum())
    chunk = Chunk(policy, first, end, num_spilled, separators[separators >= left])
    held, mask = positions(chunk, is_separator), visible_mask(policy, is_separator)
    covered = 0
    for tile in query_tiles(chunk, tile_size):
        assert tile.first == covered
        covered = tile.last
        num_full = len(tile.keys) - tile.hidden.shape[1]
        for row, hidden in enumerate(tile.hidden):
            keys = [*tile.keys[:num_full], *tile.keys[num_full:][~hidden]]
            query = first + tile.first + row
            assert sorted(held[key] for key in keys) == np.flatnonzero(mask[query]).tolist()
        # no key is listed that no query of the tile reads, none masked that all of them read
        assert (~tile.hidden).any(axis=0).all()
        assert tile.hidden.any(axis=0).all()
        if policy.max_separators is None:
            assert tile.hidden.shape[1] <= 2 * (tile.last - tile.first)
    assert covered == end - first
