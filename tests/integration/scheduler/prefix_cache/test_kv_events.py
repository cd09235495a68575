"""Routers are told what a prompt would find; vLLM's real schedulers, pools and publisher, no model.

test_machine.py has random traffic, step by step, beside other kinds of layers, in full pools.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    generate_block_hash_extra_keys,
    hash_block_tokens,
    maybe_convert_block_hash,
)

from tests.support.router import Router
from tests.support.schedulers import BLOCK, Run, Setting, make_request, random_tokens, write_model

ENDS = 1  # behind the one KV cache group of the model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


class Subscriber:
    """A router behind a socket."""

    def __init__(self, run: Run, endpoint: str) -> None:
        self.router = Router(BLOCK, [0], ENDS)
        self.events: list[Any] = []
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.subscribe("")
        self._publisher = run.scheduler.kv_event_publisher
        self._num_published = 0
        self._publish, self._publisher.publish = self._publisher.publish, self._count
        while not self._socket.poll(20):  # what is said before it listens is lost
            self._publish(KVEventBatch(ts=0.0, events=[]))
        while self._socket.poll(200):
            self._socket.recv_multipart()

    def _count(self, batch: KVEventBatch) -> None:
        self._num_published += 1
        self._publish(batch)

    def listen(self) -> None:
        """Take in all that was published so far."""
        for _ in range(self._num_published):
            assert self._socket.poll(5000), "a batch was lost"
            _, _, payload = self._socket.recv_multipart()
            events = self._decoder.decode(payload).events
            self.events += events
            self.router.take(events)
        self._num_published = 0

    def close(self) -> None:
        self._publisher.shutdown()
        self._socket.close(linger=0)


@contextmanager
def listening(setting: Setting, seed: int = 0) -> Iterator[tuple[Run, Subscriber]]:
    run = Run(setting, seed)
    assert setting.events is not None
    subscriber = Subscriber(run, setting.events)
    try:
        yield run, subscriber
    finally:
        subscriber.close()


def found(run: Run, prompt: list[int], **extra: Any) -> tuple[int, list[BlockHash]]:
    """Tokens that a prompt would find now, and its hashes: nothing of it stays."""
    scheduler, request = run.scheduler, make_request("probe", prompt, 1, extra_args=extra)
    scheduler._take_in(request)
    _, num_tokens = scheduler._prefix_cache.find(scheduler._live["probe"], len(prompt) - 1, ())
    scheduler._live.forget("probe")
    return num_tokens, list(request.block_hashes)


@pytest.mark.compatibility("KV events for routers (`--kv-events-config`)", "exact, over ZMQ")
@pytest.mark.parametrize("kind", ["sync", "async", "drafts"])
def test_a_router_knows_what_each_prompt_would_find(model: Path, kind: str) -> None:
    """Chats that go on, prompts that part, windows of requests' own, aborts, resets, a small pool.

    A router that counts blocks and knows no groups expects that much at least.
    """
    pick = random.Random(7)
    trunks = [random_tokens(pick, 700) for _ in range(3)]
    said: list[tuple[list[int], dict[str, int]]] = []
    excess, truth = 0, 0
    setting = Setting(model, kind, 160, events=f"inproc://{kind}")
    with listening(setting, seed=3) as (run, subscriber):
        for number in range(120):
            if number % 3 == 0:
                prompt = pick.choice(trunks)[: pick.randrange(1, 700)]
                extra = {"sepllm_window": 60} if pick.random() < 0.2 else {}
                if said and pick.random() < 0.5:
                    prompt, extra = pick.choice(said)
                prompt = [*prompt, *random_tokens(pick, pick.randrange(1, 90))]
                said.append((prompt, extra))
                run.arrive(prompt, pick.randrange(1, 60), **extra)
            if number % 31 == 30:
                run.abort()
            if number == 70:
                assert run.scheduler.reset_prefix_cache(reset_running_requests=True)
            run.step()
            if run.pool.kv_event_queue:  # a step ahead of its answer; said with the next one
                continue
            subscriber.listen()
            for prompt, extra in pick.sample(said, min(8, len(said))):
                longer = [*prompt, 2]
                num_tokens, hashes = found(run, longer, **extra)
                router = subscriber.router
                assert router.num_found(longer, hashes, len(prompt)) == num_tokens
                most = router.most_found(hashes)
                assert most >= num_tokens // BLOCK * BLOCK
                excess, truth = excess + most - num_tokens, truth + num_tokens
        run.finish()
        subscriber.listen()
        assert truth > 0
        print(f"{kind}: {truth} tokens found, {excess / truth:+.1%} expected by counting blocks")


def test_blocks_have_the_names_that_vllm_gives_them(model: Path) -> None:
    """Proves it with a router of its own hashes: tokens, salt of a policy, cache_salt."""
    pick = random.Random(1)
    with listening(Setting(model, events="inproc://names")) as (run, subscriber):
        requests = []
        for number, extra in enumerate(({}, {"sepllm_window": 60}, {})):
            salt = "tenant" if number == 2 else None
            prompt = random_tokens(pick, 300)
            request = make_request(f"r{number}", prompt, 4, extra_args=extra, cache_salt=salt)
            run.scheduler.add_request(request)
            requests.append(request)
        run.finish()
        subscriber.listen()
        salts = set()
        names = {maybe_convert_block_hash(h): h for r in requests for h in r.block_hashes}
        for event in subscriber.events:
            assert isinstance(event, BlockStored)
            parent = None if event.parent_block_hash is None else names[event.parent_block_hash]
            keys = event.extra_keys or [None]
            for index, name in enumerate(event.block_hashes):
                tokens = event.token_ids[index * event.block_size :][: event.block_size]
                salted = keys[index] and tuple(("cache_salt", salt) for salt in keys[index])
                parent = hash_block_tokens(sha256, parent, tokens, salted)
                assert maybe_convert_block_hash(parent) == name
                salts.add(keys[index])
        assert salts == {None, ("sepllm=4,60:",), ("tenant",)}
        tagged, _ = generate_block_hash_extra_keys(requests[2], 0, BLOCK, 0)
        assert tagged == (("cache_salt", "tenant"),), "what the salts are tagged with"


def test_a_pool_that_wants_tokens_behind_blocks_is_given_none(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BlockPool since vLLM 0.33: hashes may cover tokens behind a block, and events tell them."""
    build = BlockPool._build_block_stored_event
    is_known = "lookahead_token_ids" in signature(build).parameters
    told = []

    def as_since_0_33(self: BlockPool, *given: Any, lookahead_token_ids: Any, **more: Any) -> Any:
        told.append(lookahead_token_ids)
        known = {"lookahead_token_ids": lookahead_token_ids} if is_known else {}
        return build(self, *given, **more, **known)

    monkeypatch.setattr(BlockPool, "_build_block_stored_event", as_since_0_33)
    monkeypatch.setattr(BlockPool, "num_hash_lookahead_tokens", 0, raising=False)
    with listening(Setting(model, events="inproc://ahead")) as (run, subscriber):
        run.arrive(random_tokens(random.Random(1), 300), 4)
        run.finish()
        subscriber.listen()
        assert subscriber.events
    assert told
    assert set(told) == {None}


def test_two_adapters_with_one_text_are_told_apart(model: Path) -> None:
    """By the names of blocks, the field of the event, and extra keys that give the names."""
    prompt = random_tokens(random.Random(1), 300)
    adapters = [None, LoRARequest("one", 1, "/one"), LoRARequest("two", 2, "/two")]
    told: dict[str | None, list[Any]] = {}
    with listening(Setting(model, events="inproc://adapters")) as (run, subscriber):
        for number, adapter in enumerate(adapters):
            request = make_request(f"r{number}", prompt, 4, lora_request=adapter)
            run.scheduler.add_request(request)
            run.finish()
            subscriber.listen()
            name = adapter.lora_name if adapter is not None else None
            assert {event.lora_name for event in subscriber.events} == {name}
            keys = {key for event in subscriber.events for key in event.extra_keys or [None]}
            assert keys == {None if name is None else (name,)}
            hashes = [maybe_convert_block_hash(each) for each in request.block_hashes]
            assert subscriber.router.num_found(prompt, request.block_hashes, 300) > 256
            told[name] = [each for event in subscriber.events for each in event.block_hashes]
            assert {*hashes} <= {*told[name]}
            subscriber.events.clear()
    assert len({each for names in told.values() for each in names}) == sum(
        len({*names}) for names in told.values()
    )


def test_short_prompts_are_announced_as_by_stock_vllm(model: Path) -> None:
    """Up to a + n tokens: the same blocks, in the same order; beside them, where hits end."""
    policy = (("window", 400), ("checkpoint_interval", 512))
    told = {}
    for kind in ("stock", "sync"):
        pick = random.Random(5)
        setting = Setting(model, kind, 300, policy=policy, events=f"inproc://short-{kind}")
        with listening(setting) as (run, heard):
            prompts = [random_tokens(pick, 90) for _ in range(4)]
            for prompt in (*prompts, prompts[0] + prompts[1]):
                run.arrive(prompt, 1)
                run.finish()
            heard.listen()
            told[kind] = [
                (name, event.parent_block_hash, event.token_ids, event.block_size)
                for event in heard.events
                if event.group_idx == 0
                for name in event.block_hashes
            ]
    assert len(told["stock"]) == len(told["sync"]) > 10
    assert told["stock"] == told["sync"]


def test_a_request_may_ask_for_a_full_report(model: Path) -> None:
    """vLLM's kv_cache_report_mode: the blocks of a hit are named once more, by their tokens."""
    prompt = random_tokens(random.Random(2), 500)
    with listening(Setting(model, events="inproc://full")) as (run, subscriber):
        run.arrive(prompt, 1)
        run.finish()
        subscriber.listen()
        subscriber.events.clear()
        longer = [*prompt, 3, 4]
        num_tokens, hashes = found(run, longer)
        assert num_tokens > 256, "more tokens than its compact blocks hold"
        run.arrive(longer, 1, kv_cache_report_mode="full")
        run.finish()
        subscriber.listen()
    report = subscriber.events[0]
    number = num_tokens // BLOCK
    assert report.block_hashes == [maybe_convert_block_hash(h) for h in hashes[:number]]
    assert report.token_ids == prompt[: number * BLOCK]
