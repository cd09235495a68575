"""After a request has ended nothing of ours mentions it, under vLLM's real schedulers."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import Request

from tests.support.schedulers import Run, Setting, random_tokens, write_model

KINDS = ("sync", "async", "drafts")
ROOTS = ("_live", "_coordinator", "_planner", "_usage", "_prefix_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


def mentions(root: Any, request_id: str) -> Iterator[str]:
    """Paths from an object of ours to the id or to vLLM's request; vLLM's objects stay closed."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, str):
            if found == request_id:
                yield path
        elif isinstance(found, Request):
            if found.request_id == request_id:
                yield path
        elif isinstance(found, dict):
            stack += [(f"{path}[{k!r:.40}] key", k) for k in found]
            stack += [(f"{path}[{k!r:.40}]", v) for k, v in found.items()]
        elif isinstance(found, list | tuple | set | frozenset):
            stack += [(f"{path}[]", item) for item in found]
        elif type(found).__module__.startswith("vllm_sepllm"):
            names = [*getattr(found, "__dict__", ()), *getattr(type(found), "__slots__", ())]
            stack += [(f"{path}.{n}", getattr(found, n)) for n in names if hasattr(found, n)]


def check_ended(run: Run, alive: set[str]) -> None:
    """Requests of ``alive`` that have ended are mentioned nowhere, and leave the set."""
    ended = alive.difference(run.scheduler.requests)
    alive.difference_update(ended)
    for name in ended:
        for root in ROOTS:
            found = list(mentions(getattr(run.scheduler, root), name))
            assert not found, f"{root}{found}"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.sampled_from([14, 24, 120]),
    with_full=st.booleans(),
    seed=st.integers(0, 1000),
    actions=st.lists(
        st.sampled_from(
            ["step"] * 10 + ["arrive", "arrive", "window", "initial", "abort", "reset"]
        ),
        min_size=20,
        max_size=80,
    ),
)
def test_nothing_mentions_a_request_that_has_ended(
    model: Path, kind: str, num_blocks: int, with_full: bool, seed: int, actions: list[str]
) -> None:
    """Arrivals, aborts, preemptions, prefix hits, drafts; at the end every block is free again."""
    setting = Setting(model, kind, num_blocks)
    if with_full and kind != "drafts":  # with room for the longest request
        setting = replace(setting, with_full=True, num_blocks=max(48, num_blocks))
    run = Run(setting, seed, log_stats=True)
    num_free = run.pool.get_num_free_blocks()
    shared = random_tokens(run.pick, 400)
    alive: set[str] = set()
    for action in actions:
        own = random_tokens(run.pick, 1 + run.pick.randrange(40))
        prompt = [*shared[: run.pick.randrange(400)], *own]
        if action == "arrive":
            alive.add(run.arrive(prompt, run.pick.choice([1, 5, 60])))
        elif action == "window":
            alive.add(run.arrive(prompt, 20, sepllm_window=run.pick.choice([16, 100])))
        elif action == "initial":
            initial = run.pick.choice([0, 40, 300])
            alive.add(run.arrive(prompt, 20, sepllm_initial_tokens=initial))
        elif action == "abort":
            run.abort()
        elif action == "reset":
            run.scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            run.step()
        check_ended(run, alive)
    run.finish()
    check_ended(run, alive)
    assert not alive
    assert len(run.scheduler._live) == 0
    assert run.pool.get_num_free_blocks() == num_free


@pytest.mark.parametrize("kind", KINDS)
def test_the_property_is_about_something(model: Path, kind: str) -> None:
    """While a request runs it is mentioned; hits, preemptions and right drafts do happen."""
    num_hits = num_preemptions = num_committed = 0
    for num_blocks in (14, 24):
        run = Run(Setting(model, kind, num_blocks), seed=1, log_stats=True)
        shared = random_tokens(run.pick, 400)
        for number in range(300):
            if number % 9 == 0:
                run.arrive([*shared[: run.pick.randrange(400)], 1, number], 60)
            run.step()
        assert run.scheduler.requests
        for name in run.scheduler.requests:
            assert list(mentions(run.scheduler._live, name))
        num_hits += sum(number > 0 for number in run.num_reused.values())
        num_preemptions += run.num_preemptions
        num_committed += run.num_committed
    assert num_hits > 0
    assert num_preemptions > 0
    assert (num_committed > 0) == (kind == "drafts")


def test_a_request_that_has_ended_waits_for_no_garbage_collector(model: Path) -> None:
    """As vLLM's own: a long prompt is megabytes of token ids."""
    run = Run(Setting(model, "sync", 24))
    name = run.arrive(random_tokens(run.pick, 100), 3)
    request = weakref.ref(run.scheduler.requests[name])
    gc.disable()
    try:
        run.finish()
        run.step()  # the schedulers' notes of the last step
        assert request() is None
    finally:
        gc.enable()
