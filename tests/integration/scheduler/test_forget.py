"""After a request has ended nothing of ours mentions it, under vLLM's real schedulers."""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.tiny_configs import llama_config
from vllm_sepllm.integration.scheduler.scheduler import SepLLMAsyncScheduler, SepLLMScheduler
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.wire.spec import SepLLMSpec

BLOCK, NUM_DRAFTS = 32, 3
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
KINDS = {"sync": SepLLMScheduler, "async": SepLLMAsyncScheduler, "drafts": SepLLMScheduler}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama_config(vocab_size=64, max_position_embeddings=2048).save_pretrained(folder)
    return folder


@cache
def configure(model: Path, kind: str) -> VllmConfig:
    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        attention_backend="sepllm",
        additional_config={"sepllm": {"separators": [1], "window": 28, "checkpoint_interval": 64}},
        max_num_batched_tokens=96,
        max_num_seqs=6,
        async_scheduling=kind == "async",
    ).create_engine_config()
    if kind == "drafts":  # refused on CPUs, whose model runner has no drafter for it
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=NUM_DRAFTS,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
    return config


def make_scheduler(model: Path, kind: str, num_blocks: int, with_full: bool) -> SepLLMScheduler:
    config = configure(model, kind)
    config.cache_config.num_gpu_blocks = num_blocks
    policy = read_config(config).policy
    specs = [SepLLMSpec.from_full_attention(FULL, policy), *([FULL] if with_full else [])]
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    return KINDS[kind](
        config,
        KVCacheConfig(num_blocks, [], groups),
        StructuredOutputManager(config),
        BLOCK,
        log_stats=True,
    )


def mentions(root: Any, request_id: str) -> Iterator[str]:
    """Paths from an object of ours to the id or to vLLM's request; vLLM's objects stay closed."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if found == request_id if isinstance(found, str) else False:
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


class Engine:
    """A scheduler and a worker that samples what it likes."""

    def __init__(self, model: Path, kind: str, num_blocks: int, with_full: bool, seed: int) -> None:
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = make_scheduler(model, kind, num_blocks, with_full)
        self.num_free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self.drafts = kind == "drafts"
        self.pick = random.Random(seed)
        self.in_flight: list[Any] = []
        self.lag = int(kind == "async")
        self.counter = 0
        self.seen: set[str] = set()
        self.hits = self.preemptions = self.commits = 0
        self.shared = self.tokens(400)

    def tokens(self, number: int) -> list[int]:
        return [
            1 if self.pick.random() < 0.3 else self.pick.randrange(2, 60) for _ in range(number)
        ]

    def arrive(self, window: int | None, max_tokens: int) -> None:
        self.counter += 1
        prompt = self.shared[: self.pick.randrange(400)] + self.tokens(1 + self.pick.randrange(40))
        extra = {} if window is None else {"sepllm_window": window}
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        name = f"request-{self.counter}"
        request = Request(name, prompt, sampling, None, block_hasher=self.hasher)
        self.seen.add(name)
        self.scheduler.add_request(request)

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.hits += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        self.preemptions += len(output.preempted_req_ids or ())
        self.in_flight.append(output)
        if len(self.in_flight) > self.lag:
            self.answer(self.in_flight.pop(0))

    def answer(self, output: Any) -> None:
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            if request is None or request.is_prefill_chunk:
                sampled.append([])
                continue
            drafts = output.scheduled_spec_decode_tokens.get(name, [])
            right = drafts[: self.pick.randrange(len(drafts) + 1)]
            self.commits += bool(right)
            sampled.append([*right, *self.tokens(1)])
        rows = {name: row for row, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))
        if self.drafts:
            ids = [n for n in names if n in self.scheduler.requests]
            proposed = [self.tokens(self.pick.randrange(NUM_DRAFTS + 1)) for _ in ids]
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, proposed))

    def abort(self) -> None:
        if self.scheduler.requests:
            name = self.pick.choice(list(self.scheduler.requests))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def check(self) -> None:
        ended = self.seen.difference(self.scheduler.requests)
        self.seen.difference_update(ended)
        for name in ended:
            for root in ("_live", "_coordinator", "_planner", "_usage", "_prefix_cache"):
                found = list(mentions(getattr(self.scheduler, root), name))
                assert not found, f"{root}{found}"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.sampled_from([14, 24, 120]),
    with_full=st.booleans(),
    seed=st.integers(0, 1000),
    actions=st.lists(
        st.sampled_from(["step"] * 10 + ["arrive", "arrive", "window", "abort", "reset"]),
        min_size=20,
        max_size=80,
    ),
)
def test_nothing_mentions_a_request_that_has_ended(
    model: Path, kind: str, num_blocks: int, with_full: bool, seed: int, actions: list[str]
) -> None:
    """Arrivals, aborts, preemptions, prefix hits, drafts; at the end every block is free again."""
    with_full = with_full and kind != "drafts"
    if with_full:  # room for the longest request
        num_blocks = max(48, num_blocks)
    engine = Engine(model, kind, num_blocks, with_full, seed)
    for action in actions:
        if action == "arrive":
            engine.arrive(None, engine.pick.choice([1, 5, 60]))
        elif action == "window":
            engine.arrive(engine.pick.choice([16, 100]), 20)
        elif action == "abort":
            engine.abort()
        elif action == "reset":
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            engine.step()
        engine.check()
    while engine.scheduler.requests:
        engine.step()
        engine.check()
    assert not engine.seen
    assert len(engine.scheduler._live) == 0
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == engine.num_free


@pytest.mark.parametrize("kind", KINDS)
def test_the_property_is_about_something(model: Path, kind: str) -> None:
    """While a request runs it is mentioned; hits, preemptions and right drafts do happen."""
    engine = Engine(model, kind, 14, False, 1)
    for number in range(300):
        if number % 9 == 0:
            engine.arrive(None, 60)
        engine.step()
    assert engine.scheduler.requests
    for name in engine.scheduler.requests:
        assert list(mentions(engine.scheduler._live, name))
    assert engine.hits > 0
    assert engine.preemptions > 0
    assert (engine.commits > 0) == (kind == "drafts")
