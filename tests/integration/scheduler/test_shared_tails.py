"""A request shares its tail until the tail is nearly a ring, and a session never does."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_sepllm.integration.scheduler.live_requests import Holding, LiveRequest, LiveRequests
from vllm_sepllm.integration.scheduler.shared_tails import _MARGIN, _STEPS, SharedTails
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.visibility import Policy

SLACK = _STEPS * _MARGIN
LIMIT = 2 * SLACK


def make(
    token_ids: list[int], max_tokens: int, window: int = 16, **fields: Any
) -> tuple[SharedTails, LiveRequest]:
    """A running request, whose separators are its ones; ``grow`` gives it one more token."""
    request = SimpleNamespace(
        request_id="r",
        _all_token_ids=token_ids,
        num_tokens=len(token_ids),
        num_prompt_tokens=len(token_ids),
        max_tokens=max_tokens,
        resumable=False,
        block_hashes=[],
    )
    vars(request).update(fields)
    policy = Policy(0, window, LIMIT)
    requests = LiveRequests(TokenSeparators((1,)), policy)
    live = requests.add(request, policy)  # type: ignore[arg-type]
    return SharedTails(requests, 1), live


def grow(request: Any, token: int) -> None:
    request._all_token_ids.append(token)
    request.num_tokens += 1


def test_long_answers_do_not_keep_a_request_from_sharing() -> None:
    tails, live = make([1] * 10, max_tokens=100_000)
    assert not tails.may_wrap(live)


def test_one_that_comes_near_the_bound_is_found_before_it_is_there() -> None:
    """Every token is a separator, so the bound comes as fast as it can."""
    tails, live = make([1] * 10, max_tokens=100_000)
    tails.takes_part(live)
    for _ in range(LIMIT):
        found = tails.near_the_bound([live.request])
        if found:
            break
        grow(live.request, 1)
    assert found == [live.request]
    # tokens in flight may be separators, too
    assert LIMIT - SLACK < live.request.num_tokens < LIMIT - SLACK + 2 * _STEPS
    # preempted, it goes on without sharing and is not found again
    live.holding = Holding()
    tails.takes_part(live)
    assert tails.may_wrap(live)
    for _ in range(3 * _STEPS):
        assert not tails.near_the_bound([live.request])
        grow(live.request, 1)


def test_a_tail_no_longer_than_the_ring_is_no_reason_to_preempt() -> None:
    for window, is_short in ((LIMIT, True), (LIMIT - 1, False)):
        tails, live = make([1] * 10, max_tokens=100_000, window=window)
        tails.takes_part(live)
        assert tails.may_wrap(live) is is_short
        for _ in range(LIMIT + _STEPS):
            grow(live.request, 1)
        found = [tails.near_the_bound([live.request]) for _ in range(_STEPS)]
        assert any(found) is not is_short
    tails, live = make([1] * 10, max_tokens=LIMIT - 10, window=LIMIT)
    assert not tails.may_wrap(live), "all that it may generate fits"


def test_a_request_without_a_tail_is_not_preempted() -> None:
    """Such as one that chose full attention, whose window is the longest request."""
    tails, live = make([1] * 10, max_tokens=LIMIT)
    live.index.policy = Policy(0, 10 + LIMIT, LIMIT)
    tails.takes_part(live)
    for _ in range(LIMIT):
        assert not tails.near_the_bound([live.request])
        grow(live.request, 1)


def test_text_without_separators_never_comes_near() -> None:
    tails, live = make([1] * 10, max_tokens=100_000)
    tails.takes_part(live)
    for _ in range(3 * LIMIT):
        assert not tails.near_the_bound([live.request])
        grow(live.request, 0)
    assert not tails.may_wrap(live)


def test_an_answer_that_cannot_fill_the_tail_is_no_danger() -> None:
    tails, live = make([1] * (LIMIT - 5), max_tokens=5)
    assert not tails.may_wrap(live)
    tails, live = make([1] * (LIMIT - 5), max_tokens=6)
    assert tails.may_wrap(live)


def test_a_session_shares_nothing_and_its_last_turn_neither() -> None:
    """What it began with is its own; that its last turn could share is not worth a look."""
    tails, live = make([1] * 10, max_tokens=5, resumable=True)
    tails.takes_part(live)
    assert tails.may_wrap(live)
    live.request.resumable = False
    assert tails.may_wrap(live)
    live.holding = Holding()
    assert not tails.may_wrap(live)
