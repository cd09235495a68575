"""Invariants 2 and 3 without tensors: a cache of positions, driven by plan and plan_batch.

Every step of one request is played on a dictionary compact index -> position. What each query reads
must be the rule's visible set, exactly once each, whatever the chunks.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.simulated_cache import SEPARATORS, Cache, policies
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.visibility import Policy


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
