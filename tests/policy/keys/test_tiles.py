"""The tile tables, decoded the way the kernel does, against the rule."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_sepllm.policy.keys.tiles import (
    NEVER,
    PrefillRequests,
    PrefillTiles,
    plan_tiles,
    rank_bound,
)
from vllm_sepllm.policy.visibility import AnyPolicy, BatchPolicy, Policy, is_visible

policies = st.builds(
    Policy,
    initial_tokens=st.integers(0, 5),
    window=st.integers(1, 12),
    max_separators=st.none() | st.integers(0, 4),
)
flags = st.lists(st.booleans(), max_size=40)
# (is_separator, chunk_start as a fraction)
prompts = st.lists(st.tuples(flags, st.floats(0, 1)), min_size=1, max_size=3)


# None: all requests have the engine's
windows = st.none() | st.lists(st.integers(1, 50), min_size=3, max_size=3).map(np.array)


def with_windows(policy: Policy, window: np.ndarray | None) -> BatchPolicy:
    """The policies of three requests."""
    if window is None:
        window = np.full(3, policy.window)
    return BatchPolicy(policy.initial_tokens, window, policy.max_separators)


def plan(
    policy: AnyPolicy, prompts: list[tuple[list[bool], int]], tile_tokens: int
) -> PrefillTiles:
    """Tables for prompts (is_separator, chunk_start), their chunks one after the other."""
    if isinstance(policy, Policy):
        policy = with_windows(policy, None)
    policy = policy.of_rows(slice(len(prompts)))
    lowest = [
        max(policy.initial_tokens, start - policy.of_row(row).window)
        for row, (_, start) in enumerate(prompts)
    ]
    listed = [
        [p for p in range(low, len(is_separator)) if is_separator[p]]
        for (is_separator, _), low in zip(prompts, lowest, strict=True)
    ]
    lengths = [len(is_separator) - start for is_separator, start in prompts]
    requests = PrefillRequests(
        table_row=np.arange(len(prompts)),
        query_start=np.cumsum([0, *lengths[:-1]]),
        chunk_start=np.array([start for _, start in prompts]),
        chunk_end=np.array([len(is_separator) for is_separator, _ in prompts]),
        num_spilled=np.array(
            [
                sum(is_separator[policy.initial_tokens : low])
                for (is_separator, _), low in zip(prompts, lowest, strict=True)
            ]
        ),
        separators=np.array([p for part in listed for p in part], dtype=np.int64),
        separators_start=np.cumsum([0, *map(len, listed)]),
    )
    return plan_tiles(requests, policy, tile_tokens)


def keys_of_tile(
    tables: PrefillTiles, policies: BatchPolicy, tile: np.ndarray, is_separator: list[bool]
) -> list[tuple[int, int]]:
    """(position, until) of every key that the kernel touches for one tile."""
    request, _, first, num_tokens, window_start, rank_start, _, rank_end = tile.tolist()
    row = tables.requests[request, 1:9].tolist()
    start, end, _, num_spilled, offset, count, until_start, window_size = row
    policy = policies.of_row(request)
    assert window_size == policy.window
    positions = [p for p, flag in enumerate(is_separator) if flag and p >= policy.initial_tokens]
    listed = tables.separators[offset : offset + count].tolist()
    assert listed == positions[num_spilled : num_spilled + count]
    keys = [(p, NEVER) for p in range(min(policy.initial_tokens, window_start))]
    for rank in range(rank_start, rank_end):
        later = rank + rank_bound(policy) - num_spilled
        keys.append((positions[rank], listed[later] + policy.window if later < count else NEVER))
    window = range(window_start, first + num_tokens)
    assert window_start > start - policy.window  # nothing that the ring no longer holds
    leaving = end - policy.window
    return keys + [
        (p, int(tables.until[until_start + p]) if p < leaving else NEVER) for p in window
    ]


@given(policies, windows, prompts, st.integers(1, 9))
@example(Policy(0, 1), None, [([False] * 3, 0.0)], 1)
@example(Policy(3, 2, 0), None, [([True] * 9, 0.5)], 4)
def test_tile_reads_what_the_rule_shows(policy, window, prompts, tile_tokens) -> None:
    """Every query reads its visible keys, exactly once each, and no tile touches other keys."""
    policy = with_windows(policy, window)
    cut = [(flags, int(part * len(flags))) for flags, part in prompts]
    tables = plan(policy, cut, tile_tokens)
    covered = []
    for tile in tables.tiles:
        request, row, first, num_tokens = tile[:4].tolist()
        is_separator, start = cut[request]
        own = policy.of_row(request)
        covered += [(request, p) for p in range(first, first + num_tokens)]
        assert row - first == tables.requests[request, 3] - start
        keys = keys_of_tile(tables, policy, tile, is_separator)
        touched = set()
        for query in range(first, first + num_tokens):
            read = sorted(p for p, until in keys if p <= query < until)
            assert read == [
                key for key in range(query + 1) if is_visible(own, is_separator, query, key)
            ]
            touched |= set(read)
        assert touched == {p for p, _ in keys}
    assert covered == [
        (request, p) for request, (flags, s) in enumerate(cut) for p in range(s, len(flags))
    ]


@given(policies, prompts, st.integers(1, 9))
def test_cached_separators_are_those_before_the_chunk(policy, prompts, tile_tokens) -> None:
    cut = [(flags, int(part * len(flags))) for flags, part in prompts]
    for tile in plan(policy, cut, tile_tokens).tiles:
        is_separator, start = cut[tile[0]]
        before = sum(is_separator[policy.initial_tokens : start])
        rank_start, rank_split, rank_end = tile[5:].tolist()
        assert rank_split == min(max(before, rank_start), rank_end)


@given(policies, windows, prompts, st.integers(1, 9))
def test_ranks_of_a_request_are_those_of_its_tiles(policy, window, prompts, tile_tokens) -> None:
    policy = with_windows(policy, window)
    cut = [(flags, int(part * len(flags))) for flags, part in prompts]
    tables = plan(policy, cut, tile_tokens)
    for request, (is_separator, start) in enumerate(cut):
        tiles = tables.tiles[tables.tiles[:, 0] == request]
        if len(tiles) == 0:
            assert tables.num_keys[request] == 0
            continue
        first, split, end = tables.requests[request, 10:].tolist()
        assert first == tiles[:, 5].min()
        assert end == tiles[:, 7].max()
        before = sum(is_separator[policy.initial_tokens : start])
        assert split == min(max(before, first), end)


def test_tables_are_aligned_views_of_one_array() -> None:
    tables = plan(Policy(2, 4), [([True] * 11, 3), ([False] * 5, 5)], 4)
    for table, first in zip(tables.tables, tables.offsets, strict=True):
        assert first % 4 == 0
        assert np.array_equal(tables.packed[first : first + table.size], table.ravel())


def test_size_grows_with_the_chunk_and_not_with_the_context() -> None:
    near, far = (plan(Policy(4, 64), [([True] * (s + 256), s)], 32) for s in (512, 8192))
    assert near.packed.size == far.packed.size


def test_no_request_gives_empty_tables() -> None:
    tables = plan(Policy(4, 64), [([False] * 7, 7)], 32)
    assert tables.tiles.shape == (0, 8)
    assert tables.requests.shape == (1, 13)
    assert tables.num_keys.tolist() == [0]


def test_refuses_a_separator_that_has_left() -> None:
    one = np.array([0])
    requests = PrefillRequests(
        one, one, np.array([10]), np.array([12]), one, np.array([5]), np.array([0, 1])
    )
    with pytest.raises(ValueError, match=r"separators\[0\] must be a position in \[6, 12\), got 5"):
        plan_tiles(requests, BatchPolicy(1, np.array([4])), 8)
