"""Requests with different policies never share: the whole policy is in every key."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.block_pool import BlockPool

from vllm_sepllm.integration.checkpoints import CheckpointRegistry
from vllm_sepllm.integration.request_separators import RequestSeparators
from vllm_sepllm.policy.visibility import Policy

POLICY = Policy(initial_tokens=4, window=28, max_separators=100)
FLAGS = np.array([False, True, False])
REQUEST: Any = SimpleNamespace(request_id="r", block_hashes=[b"0" * 32, b"1" * 32])
REQUESTS = {"r": REQUEST}


@pytest.mark.parametrize(
    "other",
    [
        RequestSeparators(dataclasses.replace(POLICY, initial_tokens=3), FLAGS, REQUESTS),
        RequestSeparators(dataclasses.replace(POLICY, window=27), FLAGS, REQUESTS),
        RequestSeparators(dataclasses.replace(POLICY, max_separators=None), FLAGS, REQUESTS),
        RequestSeparators(POLICY, np.array([False, True, True]), REQUESTS),
        RequestSeparators(POLICY, FLAGS, REQUESTS, choose=lambda r: Policy(4, 27, 100)),
    ],
    ids=["a", "n", "s", "separators", "the request's n"],
)
def test_a_checkpoint_of_another_policy_is_not_found(other: RequestSeparators) -> None:
    pool = BlockPool(8, enable_caching=True, hash_block_size=4)
    registry = CheckpointRegistry(pool)
    mine = RequestSeparators(POLICY, FLAGS, REQUESTS).salted(REQUEST)
    registry.add(mine[-1], 8, (), {0: pool.get_new_blocks(2)})
    same = RequestSeparators(POLICY, FLAGS.copy(), REQUESTS).salted(REQUEST)
    assert registry.find(same, [], 8) is not None
    assert registry.find(other.salted(REQUEST), [], 8) is None
    assert registry.common_prefix(mine) == 0
    assert registry.common_prefix(other.salted(REQUEST)) == 0
    assert registry.common_prefix(same) == 8
