"""The tile tables, decoded the way the kernel does, against the rule."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import rule
from vllm_sepllm.policy.keys.columns import REQUEST, RUNS, TILE
from vllm_sepllm.policy.keys.tiles import (
    NEVER,
    PrefillRequests,
    PrefillTiles,
    plan_tiles,
)
from vllm_sepllm.policy.visibility import BatchPolicy, Policy

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
windows = st.none() | st.lists(st.integers(1, 50), min_size=3, max_size=3)
initials = st.none() | st.lists(st.integers(0, 50), min_size=3, max_size=3)


def with_own(
    policy: Policy, initial_tokens: list[int] | None, window: list[int] | None
) -> Policy | BatchPolicy:
    """The policies of three requests."""
    initial_tokens = initial_tokens or [policy.initial_tokens] * 3
    window = window or [policy.window] * 3
    return BatchPolicy(np.array(initial_tokens), np.array(window), policy.max_separators)


def plan(
    policy: Policy | BatchPolicy, prompts: list[tuple[list[bool], int]], tile_tokens: int
) -> PrefillTiles:
    """Tables for prompts (is_separator, chunk_start), their chunks one after the other."""
    if isinstance(policy, Policy):
        policy = with_own(policy, None, None)
    policy = policy.of_rows(slice(len(prompts)))
    own = [policy.of_row(row) for row in range(len(prompts))]
    lowest = [
        max(row.initial_tokens, start - row.window)
        for row, (_, start) in zip(own, prompts, strict=True)
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
                sum(is_separator[row.initial_tokens : low])
                for row, (is_separator, _), low in zip(own, prompts, lowest, strict=True)
            ]
        ),
        separators=np.array([p for part in listed for p in part], dtype=np.int64),
        separators_start=np.cumsum([0, *map(len, listed)]),
    )
    return plan_tiles(requests, policy, tile_tokens)


def named(row: np.void) -> dict[str, int]:
    """Column -> number, as Python's."""
    return {name: row[name].item() for name in row.dtype.names}


def list_of(
    tables: PrefillTiles, policy: Policy, request: int, is_separator: list[bool]
) -> list[tuple[int, int]]:
    """(position, until) of each entry of a request's list of keys, in the kernel's order."""
    row = named(tables.requests[request])
    start, end = row["chunk_start"], row["chunk_end"]
    assert (row["initial_tokens"], row["window"]) == (policy.initial_tokens, policy.window)
    assert row["keys_start"] == tables.requests["num_keys"][:request].sum()
    if start == end:
        assert row["num_keys"] == 0
        return []
    positions = [p for p, flag in enumerate(is_separator) if flag and p >= policy.initial_tokens]
    first, count = row["separators_start"], row["num_separators"]
    listed = tables.separators[first : first + count].tolist()
    assert listed == positions[row["num_spilled"] : row["num_spilled"] + count]

    def near(p: int) -> tuple[int, int]:
        leaves = p < end - policy.window
        return p, int(tables.until[row["until_start"] + p]) if leaves else NEVER

    def far(rank: int) -> tuple[int, int]:
        later = rank + policy.bound - row["num_spilled"]
        return positions[rank], listed[later] + policy.window if later < count else NEVER

    assert row["window_start"] > start - policy.window  # nothing that the ring no longer holds
    keys = [(p, NEVER) for p in range(min(policy.initial_tokens, start))]
    assert len(keys) == row["far_from"]
    keys += [far(rank) for rank in range(row["rank_start"], row["rank_split"])]
    assert len(keys) == row["window_from"]
    keys += [near(p) for p in range(row["window_start"], start)]
    assert len(keys) == row["chunk_far_from"]
    keys += [far(rank) for rank in range(row["rank_split"], row["rank_end"])]
    assert len(keys) == row["chunk_from"]
    keys += [near(p) for p in range(start, end)]
    assert len(keys) == row["num_keys"]
    return keys


def keys_of_tile(
    tables: PrefillTiles, policy: Policy, request: int, tile: np.void, is_separator: list[bool]
) -> list[tuple[int, int]]:
    """(position, until) of every key that the kernel touches for one tile."""
    listed = list_of(tables, policy, request, is_separator)
    row, keys = named(tables.requests[request]), []
    first_query, end = tile["position"], tile["position"] + tile["num_tokens"]
    for source in ("cached", "chunk"):
        runs, found = named(tile[source]), []
        for part in ("initial", "far", "near"):
            first = runs[f"first_{part}"] - row["keys_start"]
            entries = range(first, first + runs[f"num_{part}"])
            is_cached = [entry < row["chunk_far_from"] for entry in entries]
            assert is_cached == [source == "cached"] * len(entries)
            found += [listed[entry] for entry in entries]
        assert runs["num_sure"] in (0, runs["num_initial"] + runs["num_far"])
        for position, until in found[: runs["num_sure"]]:
            assert position <= first_query
            assert until >= end
        keys += found
    return keys


def owners(tables: PrefillTiles) -> list[int]:
    """The request of each tile."""
    # of requests that begin at one row all but the last have no tile
    of_row = {row: request for request, row in enumerate(tables.requests["query_start"].tolist())}
    return [of_row[row] for row in tables.tiles["chunk_query_start"].tolist()]


@given(policies, initials, windows, prompts, st.integers(1, 9))
@example(Policy(0, 1), None, None, [([False] * 3, 0.0)], 1)
@example(Policy(3, 2, 0), None, None, [([True] * 9, 0.5)], 4)
@example(Policy(0, 2, 3), None, None, [([True] * 20, 0.0), ([True] * 20, 0.5)], 6)
@example(Policy(0, 1), [0, 5, 25], [3, 2, 4], [([True] * 20, 0.5)] * 2 + [([True] * 40, 0.3)], 4)
def test_tile_reads_what_the_rule_shows(policy, initial, window, prompts, tile_tokens) -> None:
    """Every query reads its visible keys, exactly once each, and no tile touches other keys."""
    policy = with_own(policy, initial, window)
    cut = [(flags, int(part * len(flags))) for flags, part in prompts]
    tables = plan(policy, cut, tile_tokens)
    covered = []
    for request, tile in zip(owners(tables), tables.tiles, strict=True):
        row, first, num_tokens = (
            int(tile[name]) for name in ("query_start", "position", "num_tokens")
        )
        is_separator, start = cut[request]
        own = policy.of_row(request)
        covered += [(request, p) for p in range(first, first + num_tokens)]
        assert row - first == tables.requests[request]["query_start"] - start
        assert tile["chunk_offset"] == first - start
        keys = keys_of_tile(tables, own, request, tile, is_separator)
        touched = set()
        for query in range(first, first + num_tokens):
            read = sorted(p for p, until in keys if p <= query < until)
            assert read == rule.visible(own, is_separator, query)
            touched |= set(read)
        assert touched == {p for p, _ in keys}
    assert covered == [
        (request, p) for request, (flags, s) in enumerate(cut) for p in range(s, len(flags))
    ]


@given(policies, prompts, st.integers(1, 9))
def test_cached_separators_are_those_before_the_chunk(policy, prompts, tile_tokens) -> None:
    cut = [(flags, int(part * len(flags))) for flags, part in prompts]
    tables = plan(policy, cut, tile_tokens)
    for request, tile in zip(owners(tables), tables.tiles, strict=True):
        is_separator, start = cut[request]
        before = sum(is_separator[policy.initial_tokens : start])
        rank_start, rank_split, rank_end = ranks_of_tile(tables, request, tile)
        assert rank_split == min(max(before, rank_start), rank_end)


def ranks_of_tile(tables: PrefillTiles, request: int, tile: np.void) -> tuple[int, int, int]:
    """Where the far separators of a tile begin, where those of its chunk do, where they end."""
    row = named(tables.requests[request])
    cached, chunk = named(tile["cached"]), named(tile["chunk"])
    start = row["rank_start"] + cached["first_far"] - row["keys_start"] - row["far_from"]
    split = row["rank_split"] + chunk["first_far"] - row["keys_start"] - row["chunk_far_from"]
    assert split == start + cached["num_far"]
    return start, split, split + chunk["num_far"]


@given(policies, initials, windows, prompts, st.integers(1, 9))
def test_ranks_of_a_request_are_those_of_its_tiles(
    policy, initial, window, prompts, tile_tokens
) -> None:
    policy = with_own(policy, initial, window)
    cut = [(flags, int(part * len(flags))) for flags, part in prompts]
    tables = plan(policy, cut, tile_tokens)
    for request, (is_separator, start) in enumerate(cut):
        tiles = tables.tiles[[owner == request for owner in owners(tables)]]
        row = named(tables.requests[request])
        if len(tiles) == 0:
            assert row["num_keys"] == 0
            continue
        ranks = [ranks_of_tile(tables, request, tile) for tile in tiles]
        assert row["rank_start"] == min(first for first, _, _ in ranks)
        assert row["rank_end"] == max(end for _, _, end in ranks)
        before = sum(is_separator[policy.of_row(request).initial_tokens : start])
        assert row["rank_split"] == min(max(before, row["rank_start"]), row["rank_end"])


def test_tables_are_aligned_views_of_one_array() -> None:
    tables = plan(Policy(2, 4), [([True] * 11, 3), ([False] * 5, 5)], 4)
    assert list(tables.tables) == list(tables.offsets)
    for name, table in tables.tables.items():
        first, words = tables.offsets[name], table.view(np.int32)
        assert len(words) > 0
        assert first % 4 == 0
        assert np.array_equal(tables.packed[first : first + len(words)], words)
        assert np.shares_memory(tables.packed, table)


def test_columns_are_int32_alone() -> None:
    """The device's copy is a tensor of int32: no column may be wider, nor lie between two words."""
    assert {dtype for dtype, *_ in RUNS.fields.values()} == {np.dtype(np.int32)}
    assert {dtype for dtype, *_ in TILE.fields.values()} == {np.dtype(np.int32), RUNS}
    assert {dtype for dtype, *_ in REQUEST.fields.values()} == {np.dtype(np.int32)}
    assert TILE.itemsize == 4 * (len(TILE) - 2 + 2 * len(RUNS))
    assert REQUEST.itemsize == 4 * len(REQUEST)


def test_size_grows_with_the_chunk_and_not_with_the_context() -> None:
    near, far = (plan(Policy(4, 64), [([True] * (s + 256), s)], 32) for s in (512, 8192))
    assert near.packed.size == far.packed.size


def test_no_request_gives_empty_tables() -> None:
    tables = plan(Policy(4, 64), [([False] * 7, 7)], 32)
    assert len(tables.tiles) == 0
    assert tables.requests["num_keys"].tolist() == [0]


def test_refuses_a_separator_that_has_left() -> None:
    one = np.array([0])
    requests = PrefillRequests(
        one, one, np.array([10]), np.array([12]), one, np.array([5]), np.array([0, 1])
    )
    with pytest.raises(ValueError, match=r"separators\[0\] must be a position in \[6, 12\), got 5"):
        plan_tiles(requests, BatchPolicy(np.array([1]), np.array([4])), 8)
