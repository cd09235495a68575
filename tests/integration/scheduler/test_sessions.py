"""Streaming sessions under asynchronous scheduling, where a step runs past what they keep."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from vllm_sepllm.integration.scheduler.scheduler import SepLLMAsyncScheduler


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_session_gives_its_blocks_back_with_the_step_in_flight(is_waited_for: bool) -> None:
    """Token 6 was sampled and is being computed as the turn ends; the session drops it.

    Its blocks must be given back as the state after six tokens, which they are, never as that
    after five, of which one entry is overwritten.
    """
    update = SimpleNamespace(
        mm_features=None, prompt_token_ids=[7], arrival_time=0.0, sampling_params=None, max_tokens=4
    )
    session: Any = SimpleNamespace(
        request_id="session",
        resumable=True,
        num_computed_tokens=6,
        num_output_placeholders=1,
        num_in_flight_tokens=1,
        spec_token_ids=[],
        streaming_queue=[] if is_waited_for else SimpleNamespace(popleft=lambda: update),
        num_prompt_tokens=3,
        num_tokens=6,
        _all_token_ids=[1, 2, 3, 4, 5, 6],
        block_hashes=[],
        _output_token_ids=[4, 5, 6],
        prompt_token_ids=[1, 2, 3],
        mm_features=[],
        update_block_hashes=lambda: None,
        status=RequestStatus.RUNNING,
    )
    freed: list[tuple[int, list[int]]] = []
    scheduler: Any = SepLLMAsyncScheduler.__new__(SepLLMAsyncScheduler)
    scheduler.kv_cache_manager = Mock()
    scheduler.kv_cache_manager.free = lambda request: freed.append(
        (request.num_computed_tokens, list(request._all_token_ids))
    )
    live = Mock(**{"holding.staged": None})
    scheduler._live = MagicMock(**{"__getitem__.return_value": live})
    scheduler._enqueue_waiting_request = lambda request: None
    scheduler.hash_block_size, scheduler.log_stats = 32, False
    scheduler.num_waiting_for_streaming_input = 0
    assert not scheduler._handle_stopped_request(session)
    assert freed == [(6, [1, 2, 3, 4, 5, 6])]
    if is_waited_for:
        assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        scheduler._update_request_as_session(session, update)
    assert session._all_token_ids == [1, 2, 3, 4, 5, 7]
    assert session.num_computed_tokens == 0
    scheduler._live.truncate.assert_called_once_with(live, 5)
