"""vLLM's schedulers and ours over real block pools; tokens are random, no model samples them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from vllm import SamplingParams
from vllm.config import KVEventsConfig, KVTransferConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.tiny_configs import llama_config
from vllm_sepllm.integration.scheduler.scheduler import SepLLMAsyncScheduler, SepLLMScheduler
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.wire.spec import SepLLMSpec

BLOCK = 32
NUM_DRAFTS = 3
SEPARATOR = 1
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
SLIDING = SlidingWindowSpec(
    block_size=BLOCK, sliding_window=40, num_kv_heads=1, head_size=64, dtype=torch.float32
)
KINDS = {
    "stock": Scheduler,
    "sync": SepLLMScheduler,
    "async": SepLLMAsyncScheduler,
    "drafts": SepLLMScheduler,
}


@dataclass(frozen=True)
class Setting:
    """What a scheduler is made of.

    Attributes:
        model: folder of :func:`write_model`.
        kind: one of ``KINDS``.
        num_blocks: of the pool.
        with_full: a group of full-attention layers beside ours.
        with_sliding: a group of sliding-window layers beside ours.
        max_num_batched_tokens: tokens of a step.
        max_num_seqs: requests of a step.
        policy: of ``additional_config["sepllm"]``, as items.
        load_failures: with the NixlConnector, and its policy for states that cannot be loaded.
        events: ZMQ endpoint of the KV events; None: there are none.
        host_blocks: blocks of host memory for what is evicted.
        watermark: part of the pool that a request's admission leaves free.
        tensor_parallel_size: workers, which no scheduler looks at.
    """

    model: Path
    kind: str = "sync"
    num_blocks: int = 1000
    with_full: bool = False
    with_sliding: bool = False
    max_num_batched_tokens: int = 96
    max_num_seqs: int = 6
    policy: tuple[tuple[str, Any], ...] = (("window", 28), ("checkpoint_interval", 256))
    load_failures: Literal["recompute", "fail"] | None = None
    events: str | None = None
    host_blocks: float = 0
    watermark: float = 0
    tensor_parallel_size: int = 1


def write_model(folder: Path) -> Path:
    """A configuration is all that a scheduler reads of a model."""
    llama_config(vocab_size=128, max_position_embeddings=8192).save_pretrained(folder)
    return folder


@cache
def _config(setting: Setting) -> VllmConfig:
    ours = {"separators": [SEPARATOR], **dict(setting.policy)}
    is_stock = setting.kind == "stock"
    selected: dict[str, Any] = {
        "attention_backend": "sepllm",
        "additional_config": {"sepllm": ours},
    }
    if setting.load_failures is not None:
        selected["kv_transfer_config"] = KVTransferConfig(
            kv_connector="NixlConnector",
            kv_role="kv_both",
            kv_load_failure_policy=setting.load_failures,
        )
    config = EngineArgs(
        model=str(setting.model),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        block_size=BLOCK,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_num_seqs=setting.max_num_seqs,
        tensor_parallel_size=setting.tensor_parallel_size,
        async_scheduling=setting.kind == "async",
        watermark=setting.watermark,
        kv_offloading_size=setting.host_blocks * FULL.page_size_bytes / (1 << 30) or None,
        kv_events_config=KVEventsConfig(
            enable_kv_cache_events=setting.events is not None, endpoint=setting.events or ""
        ),
        **({} if is_stock else selected),
    ).create_engine_config()
    if setting.kind == "drafts":  # refused on CPUs, whose model runner has no drafter for it
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=NUM_DRAFTS,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
    return config


def make_scheduler(setting: Setting, *, log_stats: bool = False) -> Any:
    """A scheduler with an empty pool."""
    config = _config(setting)
    config.cache_config.num_gpu_blocks = setting.num_blocks
    specs: list[KVCacheSpec] = [FULL] if setting.with_full else []
    if setting.with_sliding:
        specs.append(SLIDING)
    if setting.kind == "stock":
        specs = [FULL]
    else:
        policy = read_config(config).largest_policy
        specs.append(SepLLMSpec.from_full_attention(FULL, policy))
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    size = setting.num_blocks * FULL.page_size_bytes
    tensor = KVCacheTensor(size, [f"layer {i}" for i in range(len(specs))], size, size)
    cache_config = KVCacheConfig(setting.num_blocks, [tensor], groups)
    structured = StructuredOutputManager(config)
    return KINDS[setting.kind](config, cache_config, structured, BLOCK, log_stats=log_stats)


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int,
    *,
    stop: Sequence[int] = (),
    extra_args: dict[str, Any] | None = None,
    **fields: Any,
) -> Request:
    """A request as the engine core makes it, with hashes for the prefix cache."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    sampling = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[*stop], extra_args=extra_args
    )
    return Request(name, [*prompt], sampling, None, block_hasher=hasher, **fields)


def starts(output: SchedulerOutput) -> dict[str, int]:
    """Tokens that each scheduled request had computed, or found, before the step."""
    cached = output.scheduled_cached_reqs
    found = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return found | {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}


def answer(scheduler: Scheduler, output: SchedulerOutput, token: int) -> None:
    """End a step: every request that has no prompt left to compute samples ``token``."""
    names = list(output.num_scheduled_tokens)
    sampled = [[] if scheduler.requests[n].is_prefill_chunk else [token] for n in names]
    rows = {name: row for row, name in enumerate(names)}
    scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))


def random_tokens(pick: random.Random, number: int) -> list[int]:
    """Token ids, three in ten of them separators."""
    return [SEPARATOR if pick.random() < 0.3 else pick.randrange(2, 100) for _ in range(number)]


@dataclass
class Run:
    """A scheduler and what happened to its requests.

    Attributes:
        setting: of the scheduler.
        seed: of the sampled tokens.
        num_reused: request -> tokens that it found in the prefix cache when it was scheduled first.
        num_preemptions: of all requests.
        num_committed: steps in which drafts turned out right.
        most_running: most requests that ran at once.
    """

    setting: Setting
    seed: int = 0
    log_stats: bool = False
    num_reused: dict[str, int] = field(default_factory=dict)
    num_preemptions: int = 0
    num_committed: int = 0
    most_running: int = 0

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(self.setting, log_stats=self.log_stats)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.pick = random.Random(self.seed)
        self._in_flight: list[Any] = []
        self._lag = int(self.setting.kind == "async")
        self._counter = 0

    def arrive(self, prompt: list[int], max_tokens: int, **extra: Any) -> str:
        """A request, whose name is returned; ``extra`` are its extra_args."""
        self._counter += 1
        name = f"request-{self._counter}"
        self.scheduler.add_request(make_request(name, prompt, max_tokens, extra_args=extra))
        return name

    def step(self) -> None:
        """Schedule, and hand in what the worker has sampled."""
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            self.num_reused[new.req_id] = new.num_computed_tokens
        self.num_preemptions += len(output.preempted_req_ids or ())
        self.most_running = max(self.most_running, len(self.scheduler.running))
        self._in_flight.append(output)
        if len(self._in_flight) > self._lag:
            self._answer(self._in_flight.pop(0))

    def _answer(self, output: Any) -> None:
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests.get(name)
            if request is None or request.is_prefill_chunk:
                sampled.append([])
                continue
            drafts = output.scheduled_spec_decode_tokens.get(name, [])
            right = drafts[: self.pick.randrange(len(drafts) + 1)]
            self.num_committed += bool(right)
            sampled.append([*right, *random_tokens(self.pick, 1)])
        rows = {name: row for row, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))
        if self.setting.kind == "drafts":
            ids = [n for n in names if n in self.scheduler.requests]
            proposed = [random_tokens(self.pick, self.pick.randrange(NUM_DRAFTS + 1)) for _ in ids]
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, proposed))

    def abort(self) -> None:
        """Some request ends early."""
        if self.scheduler.requests:
            name = self.pick.choice(list(self.scheduler.requests))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def finish(self) -> None:
        """Run until no request is left."""
        while self.scheduler.requests:
            self.step()
        while self._in_flight:
            self._answer(self._in_flight.pop(0))
