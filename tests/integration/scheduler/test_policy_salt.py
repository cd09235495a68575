"""Requests with different policies never share: the whole policy is in every key."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool

from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
from vllm_sepllm.integration.scheduler.prefix_cache.checkpoint_registry import (
    CheckpointRegistry,
)
from vllm_sepllm.integration.wire.choices import salted
from vllm_sepllm.policy.choice import RequestLimits
from vllm_sepllm.policy.separators.definition import IntervalSeparators, TokenSeparators
from vllm_sepllm.policy.visibility import Policy

POLICY = Policy(initial_tokens=4, window=28, max_separators=100)
SEPARATORS = TokenSeparators((1,))
REQUEST: Any = SimpleNamespace(request_id="r", block_hashes=[b"0" * 32, b"1" * 32])
REQUESTS = {"r": REQUEST}


@pytest.mark.parametrize(
    "other",
    [
        RequestSeparators(dataclasses.replace(POLICY, initial_tokens=3), SEPARATORS, REQUESTS),
        RequestSeparators(dataclasses.replace(POLICY, window=27), SEPARATORS, REQUESTS),
        RequestSeparators(dataclasses.replace(POLICY, max_separators=None), SEPARATORS, REQUESTS),
        RequestSeparators(POLICY, TokenSeparators((1, 2)), REQUESTS),
        RequestSeparators(POLICY, IntervalSeparators(2), REQUESTS),
        RequestSeparators(POLICY, SEPARATORS, REQUESTS, choose=lambda r: Policy(4, 27, 100)),
    ],
    ids=["a", "n", "s", "separators", "an interval", "the request's n"],
)
def test_a_checkpoint_of_another_policy_is_not_found(other: RequestSeparators) -> None:
    pool = BlockPool(8, enable_caching=True, hash_block_size=4)
    registry = CheckpointRegistry(pool)
    mine = RequestSeparators(POLICY, SEPARATORS, REQUESTS).salted(REQUEST)
    registry.add(mine[-1], 8, (), {0: pool.get_new_blocks(2)})
    same = RequestSeparators(POLICY, TokenSeparators((1,)), REQUESTS).salted(REQUEST)
    assert registry.find(same, [], 8) is not None
    assert registry.find(other.salted(REQUEST), [], 8) is None
    assert registry.common_prefix(mine) == 0
    assert registry.common_prefix(other.salted(REQUEST)) == 0
    assert registry.common_prefix(same) == 8


SALTS = (
    st.none() | st.text(max_size=4) | st.sampled_from(["sepllm_window=28:", "sepllm_window=9:a"])
)


@given(*[st.tuples(st.sampled_from([9, 28, 99]), SALTS) for _ in range(2)])
def test_no_two_windows_have_a_cache_salt_in_common(
    one: tuple[int, str | None], two: tuple[int, str | None]
) -> None:
    """Layers of other kinds are found by it; users may write what they like. Empty is none."""
    limits = RequestLimits(POLICY, max_model_len=99, min_window=4)
    a, b = (
        salted(limits, dataclasses.replace(POLICY, window=window), salt)
        for window, salt in (one, two)
    )
    are_same = (one[0], one[1] or "") == (two[0], two[1] or "")
    assert ((a or "") == (b or "")) is are_same
    assert salted(limits, POLICY, "mine") == "mine"
    assert salted(limits, POLICY, None) is None
