"""Streaming sessions under asynchronous scheduling, where a step may run past what they keep."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from vllm_sepllm.integration.scheduler import SepLLMAsyncScheduler


def test_a_session_gives_its_blocks_back_and_begins_anew() -> None:
    """Its blocks go while its tokens are those that they hold: what they hold is kept by them."""
    session: Any = SimpleNamespace(
        request_id="session",
        num_computed_tokens=5,
        num_prompt_tokens=3,
        num_tokens=6,
        _all_token_ids=[1, 2, 3, 4, 5, 6],
        block_hashes=[],
        _output_token_ids=[4, 5, 6],
        prompt_token_ids=[1, 2, 3],
        mm_features=[],
        update_block_hashes=lambda: None,
        status=RequestStatus.WAITING_FOR_STREAMING_REQ,
    )
    freed: list[list[int]] = []
    scheduler: Any = SepLLMAsyncScheduler.__new__(SepLLMAsyncScheduler)
    scheduler.kv_cache_manager = Mock()
    scheduler.kv_cache_manager.free = lambda request: freed.append(list(request._all_token_ids))
    scheduler._separators = Mock()
    scheduler.hash_block_size, scheduler.log_stats = 32, False
    scheduler.num_waiting_for_streaming_input = 1
    update: Any = SimpleNamespace(
        mm_features=None, prompt_token_ids=[7], arrival_time=0.0, sampling_params=None, max_tokens=4
    )
    scheduler._update_request_as_session(session, update)
    assert freed == [[1, 2, 3, 4, 5, 6]]
    assert session._all_token_ids == [1, 2, 3, 4, 5, 7]
    assert session.num_computed_tokens == 0
    scheduler._separators.truncate.assert_called_once_with("session", 5)
