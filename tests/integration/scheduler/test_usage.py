"""The scheduler's reports against the definition, over vLLM's own scheduler and block pool."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.rule import num_kept, spilled
from tests.support.tiny_models import ARGUMENTS, SEPARATORS, write
from vllm_sepllm.integration.scheduler import usage
from vllm_sepllm.integration.scheduler.live_requests import LiveRequests
from vllm_sepllm.integration.scheduler.prefix_cache.block_count import CheckpointBlockCount
from vllm_sepllm.integration.scheduler.scheduler import SepLLMScheduler
from vllm_sepllm.integration.wire.report import PolicyUsage, take_report
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.visibility import Policy

BLOCK = 32
POLICY = Policy(initial_tokens=4, window=28, max_separators=40)
CONFIG = {"initial_tokens": 4, "window": 28, "max_separators": 40, "separators": SEPARATORS}


class Engine:
    """A scheduler that gets random tokens for whatever it schedules."""

    def __init__(self, model: Path, num_blocks: int, *, log_stats: bool = True) -> None:
        config = EngineArgs(
            model=str(model),
            attention_backend="sepllm",
            additional_config={"sepllm": CONFIG},
            max_num_seqs=4,
            max_num_batched_tokens=96,
            async_scheduling=False,
            **ARGUMENTS,
        ).create_engine_config()
        full = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32
        )
        spec = SepLLMSpec.from_full_attention(full, POLICY)
        config.cache_config.num_gpu_blocks = num_blocks
        cache = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        structured = StructuredOutputManager(config)
        self.scheduler = SepLLMScheduler(config, cache, structured, BLOCK, log_stats=log_stats)
        self.random = random.Random(0)
        init_none_hash(sha256)
        # what steps did, from vLLM's own SchedulerOutput
        self.spilled = self.num_hits = self.num_preemptions = 0

    def tokens(self, num_tokens: int) -> list[int]:
        return [self.random.choice([7, 11, *range(40, 50)]) for _ in range(num_tokens)]

    def add(self, name: str, prompt: list[int], num_new: int) -> Request:
        hasher = get_request_block_hasher(BLOCK, sha256)
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        request = Request(name, prompt, params, None, block_hasher=hasher)
        self.scheduler.add_request(request)
        return request

    def step(self) -> SchedulerStats | None:
        """One step; what the engine would send along with its outputs."""
        output = self.scheduler.schedule()
        cached = output.scheduled_cached_reqs
        start = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        start |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, num_new in output.num_scheduled_tokens.items():
            text = [t in SEPARATORS for t in self.scheduler.requests[name].all_token_ids]
            before, after = (
                len(spilled(POLICY, text, num)) for num in (start[name], start[name] + num_new)
            )
            self.spilled += after - before
            self.num_hits += start[name] > 0 and name in {
                n.req_id for n in output.scheduled_new_reqs
            }
        self.num_preemptions += len(output.preempted_req_ids or ())
        names = list(output.num_scheduled_tokens)
        sampled = [self.tokens(1) for _ in names]
        rows = {name: row for row, name in enumerate(names)}
        made = self.scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))
        return next((m.scheduler_stats for m in made.values()), None)

    def running(self) -> list[tuple[int, list[bool]]]:
        """Computed tokens, and which tokens are separators, of each request that holds blocks."""
        return [
            (r.num_computed_tokens, [t in SEPARATORS for t in r.all_token_ids])
            for r in self.scheduler.running
        ]

    def num_checkpoint_blocks(self) -> int:
        """Blocks that carry a name of the registry's, the slow way."""
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        return sum(b.block_hash is not None and b.block_hash[:6] == b"sepllm" for b in blocks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the reports take for the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(usage.time, "monotonic", lambda: now[0])
    return now


def report_of(stats: SchedulerStats | None) -> PolicyUsage | None:
    """The numbers of the only policy."""
    assert stats is not None
    report = take_report(stats)
    assert take_report(stats) is None, "nothing of ours is left for vLLM's loggers"
    if report is None:
        return None
    assert list(report) == ["28"]
    return report["28"]


def check(found: PolicyUsage | None, engine: Engine) -> None:
    """The gauges are those of the definition."""
    assert found is not None
    logical = kept = saved = 0
    for num_tokens, is_separator in engine.running():
        held = num_kept(POLICY, is_separator, num_tokens)
        logical += num_tokens
        kept += held
        saved += -(-num_tokens // BLOCK) - -(-held // BLOCK)
    assert (found.logical_tokens, found.kept_tokens) == (logical, kept)
    assert found.blocks_saved == saved
    assert found.checkpoint_blocks == engine.num_checkpoint_blocks()


@pytest.mark.parametrize("num_blocks", [7, 40])
def test_reports_are_the_definition(model: Path, clock: list[float], num_blocks: int) -> None:
    """Chunked prefills, decodes, an abort, and either preemptions or a prefix hit; a separator
    counts in each request that moves it to its tail, and not in one that found it there."""
    engine = Engine(model, num_blocks)
    prompt = engine.tokens(200)
    engine.add("r0", prompt, 40)
    engine.add("r1", engine.tokens(200), 60)
    engine.add("r2", engine.tokens(20), 90)
    counted = 0
    for step in range(400):
        clock[0] += 1.0
        if step == 60:
            engine.add("r3", prompt + engine.tokens(30), 20)
        if step == 70:
            engine.scheduler.finish_requests("r2", RequestStatus.FINISHED_ABORTED)
        found = report_of(engine.step())
        check(found, engine)
        assert found is not None
        counted += found.spilled_separators
        if not engine.scheduler.requests:
            break
    assert found == PolicyUsage(
        spilled_separators=found.spilled_separators, checkpoint_blocks=found.checkpoint_blocks
    )
    happened = engine.num_preemptions if num_blocks == 7 else engine.num_hits
    assert happened > 0
    assert counted == engine.spilled > 0


def test_reports_come_once_a_second_and_when_the_last_request_has_gone(
    model: Path, clock: list[float]
) -> None:
    engine = Engine(model, num_blocks=32)
    engine.add("r0", engine.tokens(90), 10)
    clock[0] += 1.0
    reports = [report_of(engine.step())]
    for _ in range(4):
        clock[0] += 0.2
        reports.append(report_of(engine.step()))
    assert [r is not None for r in reports] == [True, False, False, False, False]
    clock[0] += 0.3
    check(report_of(engine.step()), engine)
    reports = [report_of(engine.step()) for _ in range(4)]
    assert not engine.scheduler.requests
    *before, last = reports
    assert before == [None] * 3
    assert last is not None
    assert last.logical_tokens == last.kept_tokens == 0


@pytest.mark.compatibility("`--disable-log-stats`", "no metrics, as stock vLLM")
def test_no_statistics_no_reports(model: Path) -> None:
    """Nothing is counted, and no step has anything to report."""
    engine = Engine(model, num_blocks=32, log_stats=False)
    engine.add("r0", engine.tokens(90), 2)
    assert engine.step() is None
    assert engine.scheduler._usage is None


def test_clients_cannot_make_labels_without_end() -> None:
    manager: Any = SimpleNamespace(req_to_blocks={}, block_size=BLOCK, kv_cache_group_id=0)
    requests = LiveRequests(TokenSeparators(()), Policy(4, 16))
    watch = usage.KvUsage([manager], requests, CheckpointBlockCount(), None, 18)
    labels = [watch._label(16 + number) for number in range(100)]
    assert labels[:3] == ["16", "17", "full"]
    assert len(watch._labels) == 100
    assert labels[31:] == [usage.OTHER] * 69


def test_checkpoint_blocks_are_forgotten_with_their_keys() -> None:
    """However many come and go, the list stays within a few times the living ones."""
    count = CheckpointBlockCount()
    pool = [SimpleNamespace(block_hash=b"") for _ in range(50)]
    for number in range(10_000):
        block = pool[number % 50]
        block.block_hash = b"%d" % number  # the pool gives it to another
        count.add(block, 16)  # type: ignore[arg-type]
        assert len(count._entries) <= 3 * len(pool)
    for block in pool[:20]:
        block.block_hash = None  # type: ignore[assignment]
    assert count.count() == {16: 30}
