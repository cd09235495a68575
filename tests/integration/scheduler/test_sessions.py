"""Streaming sessions under asynchronous scheduling, where a step runs past what they keep."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.support.schedulers import (
    BLOCK,
    Setting,
    answer,
    make_request,
    make_scheduler,
    starts,
    write_model,
)

PROMPT = [2 + i % 90 for i in range(200)]
# the turn's: the session keeps the first, the step in flight computes the last
SAMPLED = [100, 101]
NEWS = [110, 111]


def hit_of(scheduler: Any, prompt: list[int]) -> int:
    """Tokens that another request with this prompt finds in the prefix cache."""
    scheduler.add_request(make_request("other", prompt, max_tokens=1))
    found = starts(scheduler.schedule())["other"]
    scheduler.finish_requests("other", RequestStatus.FINISHED_ABORTED)
    return found


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_session_gives_its_blocks_back_with_the_step_in_flight(
    is_waited_for: bool, tmp_path: Path
) -> None:
    """A token that the session drops is being computed as the turn ends, and it overwrites an
    entry: what is left is the state behind that token, and never the one before."""
    setting = Setting(write_model(tmp_path), "async", 60, max_num_batched_tokens=1024)
    scheduler = make_scheduler(setting)
    pool = scheduler.kv_cache_manager.block_pool
    num_free = pool.get_num_free_blocks()
    # what ends a turn is seen when the token is there, a step too late
    scheduler.add_request(make_request("session", PROMPT, 99, stop=SAMPLED[1:], resumable=True))
    more = make_request("session", NEWS, 5, resumable=True)
    if not is_waited_for:
        scheduler.add_request(more)
    flight = [scheduler.schedule(), scheduler.schedule()]
    answer(scheduler, flight.pop(0), SAMPLED[0])
    flight.append(scheduler.schedule())
    answer(scheduler, flight.pop(0), SAMPLED[1])
    assert flight[0].num_scheduled_tokens == {"session": 1}, "the step that computes the last token"
    session, kept = scheduler.requests["session"], [*PROMPT, SAMPLED[0]]
    if is_waited_for:
        assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        assert pool.get_num_free_blocks() == num_free
        scheduler.add_request(more)
        # if it waited with those that hold blocks, it could keep them from going on, and they it
        assert session in scheduler.waiting
        assert not scheduler.kv_holding_waiting
    assert list(session.all_token_ids) == [*kept, *NEWS]
    answer(scheduler, flight[0], 0)
    assert list(session.all_token_ids) == [*kept, *NEWS], "the late token is dropped"

    # the last block of the prompt has a checkpoint of its own
    last_block = len(PROMPT) // BLOCK * BLOCK
    assert starts(scheduler.schedule())["session"] == last_block
    assert hit_of(scheduler, [*kept, 7, 8]) == last_block
    assert hit_of(scheduler, [*kept, SAMPLED[1], 7, 8]) == len(kept) + 1


def test_blocks_that_a_step_in_flight_writes_are_for_no_state_that_arrives(tmp_path: Path) -> None:
    """A state is read into blocks at once; the token that is dropped would overwrite it."""
    setting = Setting(
        write_model(tmp_path), "async", 60, max_num_batched_tokens=1024, load_failures="recompute"
    )
    scheduler = make_scheduler(setting)
    scheduler.defer_block_free = True  # as on GPUs, where a worker may have two batches
    pool = scheduler.kv_cache_manager.block_pool
    num_free = pool.get_num_free_blocks()
    scheduler.add_request(make_request("session", PROMPT, 99, stop=SAMPLED[1:], resumable=True))
    flight = [scheduler.schedule(), scheduler.schedule()]
    answer(scheduler, flight.pop(0), SAMPLED[0])
    flight.append(scheduler.schedule())
    written = set(scheduler.kv_cache_manager.get_block_ids("session")[0])
    answer(scheduler, flight.pop(0), SAMPLED[1])
    assert scheduler.requests["session"].status == RequestStatus.WAITING_FOR_STREAMING_REQ
    assert all(pool.blocks[i].ref_cnt for i in written), "the step in flight writes them"
    answer(scheduler, flight.pop(0), 0)
    assert pool.get_num_free_blocks() == num_free


def test_a_turn_that_ends_among_right_drafts_keeps_what_it_sampled(tmp_path: Path) -> None:
    """The drafts behind its end are computed, too, and were never sampled: the next turn's tokens
    take their positions, and are computed there."""
    scheduler = make_scheduler(Setting(write_model(tmp_path), "drafts"))
    scheduler.add_request(make_request("session", PROMPT[:20], 3, resumable=True))
    answer(scheduler, scheduler.schedule(), SAMPLED[0])
    drafts = [7, 8, 9]
    scheduler.update_draft_token_ids(DraftTokenIds(["session"], [drafts]))
    output = scheduler.schedule()
    assert output.scheduled_spec_decode_tokens == {"session": drafts}
    sampled = ModelRunnerOutput(["session"], {"session": 0}, [[*drafts, SAMPLED[1]]])
    scheduler.update_from_output(output, sampled)
    session, kept = scheduler.requests["session"], [*PROMPT[:20], SAMPLED[0], drafts[0]]
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    scheduler.add_request(make_request("session", NEWS, 5, resumable=True))
    assert list(session.all_token_ids) == [*kept, *NEWS]
    assert starts(scheduler.schedule())["session"] == len(kept)
