"""Invariants 2 and 3 without tensors: a cache of positions, driven by plan, prefill and decode.

Every step a request takes is played on a dictionary compact index -> position. What each query
reads must be the rule's visible set, exactly once each, whatever the chunks.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step import decode, prefill
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy, visible_mask

SEPARATORS = TokenSeparators((1,))  # token id 1 is the separator

policies = st.builds(
    Policy,
    initial_tokens=st.integers(0, 6),
    window=st.integers(1, 17),
    max_separators=st.none() | st.integers(0, 6),
)


class Cache:
    """One request's compact cache: which position each entry holds."""

    def __init__(self, policy: Policy, token_ids: list[int]) -> None:
        self.policy = policy
        self.token_ids = token_ids
        self.index = SeparatorIndex(policy, SEPARATORS)
        self.mask = visible_mask(policy, np.array(token_ids, dtype=bool))
        self.entries: dict[int, int] = {}
        self.num_tokens = 0

    def step(self, num_new_tokens: int, tile_size: int) -> None:
        builder = StepPlanBuilder(self.policy)
        start, end = self.num_tokens, self.num_tokens + num_new_tokens
        # an asynchronous scheduler does not know the newest tokens of a decode step
        known = self.token_ids[: end if num_new_tokens > 1 else max(0, end - self.policy.window)]
        builder.add("request", self.index, known, start, num_new_tokens)
        plan = builder.build()
        if num_new_tokens == 1:
            self.decode(plan.start, plan.num_spilled, plan.spills)
        else:
            chunk = prefill.Chunk(
                self.policy, start, end, int(plan.num_spilled[0]), plan.separators[0]
            )
            self.prefill(chunk, tile_size)
        self.num_tokens = end

    def decode(self, start: np.ndarray, num_spilled: np.ndarray, spills: np.ndarray) -> None:
        copies = decode.spill_copies(self.policy, start, num_spilled, spills)
        for source, target in zip(copies.source, copies.target, strict=True):
            self.entries[int(target)] = self.entries[int(source)]
        self.entries[int(layout.ring_index(self.policy, start)[0])] = int(start[0])
        length = decode.compact_lengths(self.policy, start + 1, num_spilled, spills)[0]
        assert sorted(self.entries) == list(range(length))
        assert sorted(self.entries.values()) == np.flatnonzero(self.mask[start[0]]).tolist()

    def prefill(self, chunk: prefill.Chunk, tile_size: int) -> None:
        assert sorted(self.entries) == list(range(chunk.num_cached))
        keys = [self.entries[i] for i in range(chunk.num_cached)]
        keys += range(chunk.start, chunk.end)
        for tile in prefill.query_tiles(chunk, tile_size):
            positions = np.array([keys[k] for k in tile.keys])
            for row in range(tile.last - tile.first):
                num_full = len(positions) - tile.hidden.shape[1]
                reads = np.delete(positions, num_full + np.flatnonzero(tile.hidden[row]))
                want = np.flatnonzero(self.mask[chunk.start + tile.first + row])
                assert sorted(reads.tolist()) == want.tolist()
            # no key is listed that no query of the tile reads, none masked that all of them read
            assert (~tile.hidden).any(axis=0).all()
            assert tile.hidden.any(axis=0).all()
            if self.policy.max_separators is None:
                assert tile.hidden.shape[1] <= 2 * (tile.last - tile.first)
        left = prefill.survivors(chunk)
        moved = {
            int(target): self.entries[int(source)]
            for source, target in zip(left.copy_source, left.copy_target, strict=True)
        }
        self.entries |= moved
        for token, target in zip(left.tokens, left.target, strict=True):
            self.entries[int(target)] = chunk.start + int(token)
        length = layout.compact_length(self.policy, chunk.end, chunk.num_spilled_after)
        assert sorted(self.entries) == list(range(length))


@settings(max_examples=400, deadline=None)
@given(
    policy=policies,
    token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=90),
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 16, 40]), min_size=1, max_size=90),
    tile_size=st.sampled_from([1, 5, 16, 128]),
)
def test_every_query_reads_the_visible_set_once(
    policy: Policy, token_ids: list[int], chunks: list[int], tile_size: int
) -> None:
    cache = Cache(policy, token_ids)
    for size in chunks:
        remaining = len(token_ids) - cache.num_tokens
        if remaining == 0:
            break
        cache.step(min(size, remaining), tile_size)


@given(policies, st.lists(st.integers(0, 1), min_size=1, max_size=90))
def test_below_a_plus_n_the_layout_is_that_of_vllm(policy: Policy, token_ids: list[int]) -> None:
    """Invariant 4: compact index = position, nothing is copied, nothing is dropped."""
    num_tokens = min(len(token_ids), policy.num_dense)
    positions = np.arange(num_tokens)
    assert layout.ring_index(policy, positions).tolist() == positions.tolist()
    assert layout.compact_length(policy, num_tokens, 0) == num_tokens


@given(policies, st.integers(0, 300))
def test_longest_cache_is_a_bound_that_all_separators_reach(
    policy: Policy, num_tokens: int
) -> None:
    index = SeparatorIndex(policy, SEPARATORS)
    left = layout.num_left_window(policy, num_tokens)
    index.extend([1] * num_tokens, min(left, num_tokens))
    spilled = index.count_below(left)
    reached = layout.compact_length(policy, num_tokens, spilled)
    assert reached == layout.max_compact_length(policy, num_tokens)
