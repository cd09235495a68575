"""The sequences, read as a causal kernel with a sliding window reads them, against the rule."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import rule
from tests.support.chunks import make_chunk, positions_of
from vllm_sepllm.policy.keys.sequences import sequence_tile, tile_sequences
from vllm_sepllm.policy.visibility import Policy

BLOCK = 2


@given(
    initial_tokens=st.integers(0, 5),
    window=st.integers(4, 20),
    bound=st.none() | st.integers(0, 8) | st.just(60),
    is_separator=st.lists(st.booleans(), min_size=1, max_size=60),
    start=st.floats(0, 1),
    most=st.sampled_from([2, 4, 20]),
)
@example(4, 6, None, [True] * 40, 0.5, 4)
@example(4, 6, None, [False] * 40, 0.0, 4)
@example(5, 9, 7, [True] * 60, 0.4, 4)
def test_each_query_reads_what_the_rule_shows(
    initial_tokens, window, bound, is_separator, start, most
) -> None:
    policy = Policy(initial_tokens, window, bound)
    first = int(start * (len(is_separator) - 1))
    chunk = make_chunk(policy, is_separator, first)
    tile_size = sequence_tile(chunk, most, BLOCK)
    found = tile_sequences(chunk, tile_size, BLOCK)
    held = positions_of(chunk, is_separator)
    assert found.first[-1] == chunk.end - chunk.start
    for tile, row in enumerate(found.block_table):
        sequence = found.entries[row].ravel()[: found.lengths[tile]]
        queries = range(first + int(found.first[tile]), first + int(found.first[tile + 1]))
        for query, index in zip(reversed(queries), range(len(sequence) - 1, -1, -1), strict=False):
            lowest = max(0, index - int(found.windows[tile]) + 1)
            read = [
                held[key] for key in sequence[lowest : index + 1].tolist() if key != found.empty
            ]
            assert sorted(read) == rule.visible(policy, is_separator, query)


def test_calls_are_runs_of_tiles_with_one_window() -> None:
    chunk = make_chunk(Policy(2, 8), [i % 3 == 0 for i in range(64)], 20)
    found = tile_sequences(chunk, 4, BLOCK)
    covered = [tile for call in found.calls() for tile in range(call.start, call.stop)]
    assert covered == list(range(len(found.windows)))
    assert all(len(set(found.windows[call].tolist())) == 1 for call in found.calls())


@pytest.mark.parametrize(("window", "size"), [(3, 0), (4, 2), (5, 2), (6, 4), (99, 4)])
def test_a_tile_and_a_block_are_no_longer_than_the_window(window, size) -> None:
    chunk = make_chunk(Policy(2, window), [True] * 20, 9)
    assert sequence_tile(chunk, 4, BLOCK) == size
