"""One layer through plan, builder and vLLM's CPU kernels, against the dense mask.

Requests of several windows share a batch; decodes, chunks, short prompts and checkpoints mix. The
cache starts with huge values, so that an entry that is read before it was written shows.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sepllm.integration.wire.plan import attach_plan
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.backend import wrap_builder
from vllm_sepllm.integration.worker.cpu.builder import CPUBuilderMixin
from vllm_sepllm.integration.worker.cpu.impl import SepLLMCPUImpl
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.ops import reference
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.plan import PlannedCheckpoint, StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy, visible_mask

BLOCK, NUM_BLOCKS, MAX_BLOCKS = 32, 1500, 64
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, SCALE = 4, 2, 32, 0.2
SEPARATORS = TokenSeparators((1,))


@dataclass(eq=False)
class Request:
    """Token ids (1: a separator) with the activations of one layer, and how far it is computed."""

    name: str
    policy: Policy
    token_ids: list[int]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.index = SeparatorIndex(self.policy, SEPARATORS)

    @cached_property
    def answer(self) -> torch.Tensor:
        """[num_tokens, num_heads, head_size], the rule's, in float64."""
        mask = torch.from_numpy(visible_mask(self.policy, np.array(self.token_ids, dtype=bool)))
        exact = (part.double() for part in (self.query, self.key, self.value))
        return reference.attend(*exact, mask, SCALE)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a request after ``position`` tokens, in blocks of its own."""

    request: Request
    position: int
    blocks: list[int]


@dataclass(frozen=True)
class Part:
    """A request in a step; ``checkpoint`` is a position that the step passes or reaches."""

    request: Request
    size: int
    checkpoint: int | None = None


class Engine:
    """A builder and a layer, with a scheduler's part of the work: blocks and plans."""

    def __init__(self, policy: Policy, softcap: float) -> None:
        config: Any = SimpleNamespace(
            parallel_config=None,
            model_config=SimpleNamespace(
                dtype=torch.float32, get_num_attention_heads=lambda parallel: NUM_HEADS
            ),
            cache_config=SimpleNamespace(cache_dtype="auto"),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        full = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32
        )
        self.policy = policy
        self.builder: Any = wrap_builder(cpu_attn.CPUAttentionMetadataBuilder, CPUBuilderMixin)(
            SepLLMSpec.from_full_attention(full, policy), [], config, torch.device("cpu")
        )
        wrapped = cpu_attn.CPUAttentionBackendImpl(
            NUM_HEADS, HEAD_SIZE, SCALE, NUM_KV_HEADS, None, None, "auto", softcap
        )
        self.layer: Any = SimpleNamespace(
            impl=SepLLMCPUImpl(wrapped),
            isa=self.builder.isa,
            _k_scale_float=1.0,
            _v_scale_float=1.0,
            # NaN would spread: vLLM's kernel multiplies the rest of a block by 0
            kv_cache=torch.full((NUM_BLOCKS, NUM_KV_HEADS, BLOCK, 2 * HEAD_SIZE), 1e4),
        )
        self.step, self.names = CurrentStep(), [""]
        self.builder.bind(self.step, lambda common: self.names, 0, BLOCK, [self.layer])
        self.num_taken = 0

    def take(self, num_blocks: int) -> list[int]:
        """Blocks of the cache, the last ones first."""
        self.num_taken += num_blocks
        return [NUM_BLOCKS - self.num_taken + i for i in range(num_blocks)]

    def arrive(self, name: str, policy: Policy, token_ids: list[int]) -> Request:
        sizes = [(len(token_ids), n, HEAD_SIZE) for n in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
        gen = torch.Generator().manual_seed(int(name))
        query, key, value = (torch.randn(size, generator=gen) for size in sizes)
        return Request(name, policy, token_ids, query, key, value)

    def go_on(self, name: str, start: Checkpoint, token_ids: list[int]) -> Request:
        """A request that begins with the tokens of a checkpoint, and with its state."""
        parent, position = start.request, start.position
        made = self.arrive(name, parent.policy, parent.token_ids[:position] + token_ids)
        made.key[:position], made.value[:position] = parent.key[:position], parent.value[:position]
        made.blocks, made.num_tokens = start.blocks, position
        return made

    def run(self, parts: list[Part]) -> tuple[torch.Tensor, list[Checkpoint]]:
        """A step; the batch's output, and the checkpoints that it leaves."""
        plan = StepPlanBuilder(self.policy)
        made: list[Checkpoint] = []
        for part in reversed(parts):  # a scheduler's order is not the batch's
            request, start = part.request, part.request.num_tokens
            longest = layout.max_compact_length(request.policy, start + part.size)
            request.blocks += self.take(-(-longest // BLOCK) - len(request.blocks))
            planned = []
            if part.checkpoint is not None:
                mask = visible_mask(request.policy, np.array(request.token_ids, dtype=bool))
                num_kept = int(mask[part.checkpoint - 1].sum())
                made.append(Checkpoint(request, part.checkpoint, self.take(-(-num_kept // BLOCK))))
                blocks = dict(enumerate(made[-1].blocks))
                planned.append(PlannedCheckpoint(part.checkpoint, {0: blocks}))
            token_ids = request.token_ids
            plan.add(request.name, request.index, token_ids, start, part.size, tuple(planned))
        output = SchedulerOutput.make_empty()
        output.total_num_scheduled_tokens = sum(part.size for part in parts)
        attach_plan(output, plan.build())
        with self.step.of(output):
            self.metadata = self.builder.build(0, self.common(parts))
            found = self.forward(parts)
        for part in parts:
            part.request.num_tokens += part.size
        return found, made

    def common(self, parts: list[Part]) -> CommonAttentionMetadata:
        """The batch as vLLM's model runner describes it: lengths and slots go by position."""
        self.names = [part.request.name for part in parts]
        first = torch.tensor([0, *np.cumsum([p.size for p in parts]).tolist()], dtype=torch.int32)
        table = torch.zeros(len(parts), MAX_BLOCKS, dtype=torch.int32)
        for row, part in enumerate(parts):
            blocks = part.request.blocks
            table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        ends = [part.request.num_tokens + part.size for part in parts]
        return CommonAttentionMetadata(
            query_start_loc=first,
            query_start_loc_cpu=first,
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            num_reqs=len(parts),
            num_actual_tokens=int(first[-1]),
            max_query_len=max(part.size for part in parts),
            max_seq_len=max(ends),
            block_table_tensor=table,
            slot_mapping=torch.full((int(first[-1]),), -1),
        )

    def forward(self, parts: list[Part]) -> torch.Tensor:
        def own(name: str) -> torch.Tensor:
            rows = [
                getattr(p.request, name)[p.request.num_tokens : p.request.num_tokens + p.size]
                for p in parts
            ]
            return torch.cat(rows)

        query, layer = own("query"), self.layer
        return layer.impl.forward(
            layer, query, own("key"), own("value"), layer.kv_cache, self.metadata,
            torch.full_like(query, float("nan")),
        )  # fmt: skip


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    def make(policy: Policy, softcap: float = 0.0) -> Engine:
        config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
        monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
        return Engine(policy, softcap)

    return make


def in_batch_order(parts: list[Part]) -> list[Part]:
    """Model Runner V1's: single tokens that follow others of their request come first."""
    return sorted(parts, key=lambda part: part.size > 1 or part.request.num_tokens == 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policy", [Policy(4, 100), Policy(3, 20), Policy(2, 70, 9)], ids=str)
def test_every_query_reads_what_the_rule_shows(
    make_engine: Callable[..., Engine], policy: Policy, seed: int
) -> None:
    """The windows are served by vLLM's kernel, masked tiles, and both: separators are given up."""
    pick, engine = random.Random(seed), make_engine(policy)
    windows = [policy.window, policy.window, 40, 500]
    initial = [policy.initial_tokens, policy.initial_tokens, 0, 150]
    live: list[Request] = []
    kept: list[Checkpoint] = []
    num_arrived, used = 0, set()
    for _ in range(40):
        if len(live) < 4:
            num_arrived += 1
            text = [int(pick.random() < 0.2) for _ in range(pick.choice([1, 60, 200, 400]))]
            if kept and pick.random() < 0.5:
                live.append(engine.go_on(str(num_arrived), kept.pop(), text))
            else:
                own = replace(
                    policy, window=pick.choice(windows), initial_tokens=pick.choice(initial)
                )
                live.append(engine.arrive(str(num_arrived), own, text))
        parts = []
        for request in pick.sample(live, pick.randint(1, len(live))):
            left = len(request.token_ids) - request.num_tokens
            size = min(left, pick.choice([1, 1, 1, 2, 30, 130, 300]))
            checkpoint = request.num_tokens + pick.randint(1, size)
            parts.append(Part(request, size, checkpoint if pick.random() < 0.2 else None))
        parts = in_batch_order(parts)
        wanted = [p.request.answer[p.request.num_tokens :][: p.size] for p in parts]
        found, made = engine.run(parts)
        torch.testing.assert_close(found.double(), torch.cat(wanted), atol=2e-5, rtol=0)
        parts_of_step = ("library", "prefill", "moves", "checkpoint")
        used |= {name for name in parts_of_step if getattr(engine.metadata, name) is not None}
        kept += made
        live = [r for r in live if r.num_tokens < len(r.token_ids)]
    assert num_arrived > 5
    assert used == {"library", "prefill", "moves", "checkpoint"}


def test_literal_slots(make_engine: Callable[..., Engine]) -> None:
    """a = 2, n = 60, every fifth token a separator: a decode, a short prompt and two chunks."""
    engine = make_engine(Policy(2, 60))
    texts = [[int(i % 5 == 4) for i in range(100)] for _ in range(4)]
    decode, short, long, late = (
        engine.arrive(str(i), engine.policy, text) for i, text in enumerate(texts)
    )
    engine.run([Part(decode, 99)])
    engine.run([Part(decode, 1), Part(short, 7), Part(long, 70), Part(late, 3)])
    step = engine.metadata
    # token 99 goes to 2 + (99 - 2) % 60 = 39: entry 7 of the second block
    assert step.slots[0] == decode.blocks[1] * BLOCK + 7
    assert step.slots[1:8].tolist() == [short.blocks[0] * BLOCK + i for i in range(7)]
    assert step.library.num_tokens == 8
    # separators 4, 9, .., 34 have left the window of 60 tokens before token 99: 7; and token 39
    assert step.library.metadata.seq_lens.tolist() == [62 + 8, 7]
    # of 70 tokens the first 2 and the last 60 stay, and of the 8 between them separators 4 and 9
    kept = [*range(2), 4, 9, *range(10, 70)]
    assert [i for i in range(70) if step.slots[8 + i] >= 0] == kept
    tail = long.blocks[62 // BLOCK] * BLOCK + 62 % BLOCK
    assert step.slots[[8 + 4, 8 + 9]].tolist() == [tail, tail + 1]
    # behind a chunk a short prompt is one, too, in the order of vLLM's own cache
    assert [(c.first, c.last, c.num_cached) for c in step.prefill.chunks] == [
        (8, 78, 0),
        (78, 81, 0),
    ]
    assert step.slots[78:].tolist() == [late.blocks[0] * BLOCK + i for i in range(3)]


@pytest.mark.parametrize(
    ("window", "softcap", "is_kernel"), [(64, 0.0, 1), (63, 0.0, 0), (64, 5.0, 0)]
)
def test_which_chunks_vllms_kernel_serves(
    make_engine: Callable[..., Engine], window: int, softcap: float, is_kernel: bool
) -> None:
    engine = make_engine(Policy(2, window), softcap)
    engine.run([Part(engine.arrive("1", engine.policy, [0] * 100), 100)])
    (chunk,) = engine.metadata.prefill.chunks
    assert (chunk.sequences is not None, bool(chunk.tiles)) == (is_kernel, not is_kernel)


def test_runs_without_requests_leave_the_cache_alone(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(Policy(2, 60))
    before = engine.layer.kv_cache.clone()
    part = Part(engine.arrive("1", engine.policy, [0] * 40), 40)
    engine.metadata = engine.builder.build(0, engine.common([part]))
    assert engine.metadata is None
    assert (engine.forward([part]) == 0).all()
    assert torch.equal(engine.layer.kv_cache, before)
