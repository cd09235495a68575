"""A scheduler and metadata builders without a model: what a step costs besides its forward.

For benchmarks: the schedulers, the block pool, the plan and the builders are those of an engine,
the tokens are random and nothing is computed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_sepllm.integration.scheduler.scheduler import SepLLMScheduler
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.integration.worker.cpu.builder import CPUBuilderMixin
from vllm_sepllm.integration.worker.current_step import CurrentStep
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.plan import StepPlan

Planner = Callable[[SchedulerOutput], StepPlan]
BLOCK_SIZE = 32
SEPARATOR = 1


@dataclass(frozen=True, slots=True)
class Load:
    """The requests that the rig schedules.

    Attributes:
        num_requests: requests that decode at once.
        context: prompt tokens of each.
        density: share of separators among the tokens.
        enable_prefix_caching: as in an engine.
    """

    num_requests: int
    context: int
    density: float
    enable_prefix_caching: bool


def _vllm_config(model: Path, load: Load, is_sepllm: bool) -> VllmConfig:
    arguments: dict[str, Any] = {"attention_backend": "sepllm"} if is_sepllm else {}
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        max_model_len=load.context + 4096,
        max_num_seqs=load.num_requests,
        # all prompts in one step: it is not what is measured
        max_num_batched_tokens=load.num_requests * load.context + 4096,
        enable_prefix_caching=load.enable_prefix_caching,
        async_scheduling=False,
        additional_config={"sepllm": {"separators": [SEPARATOR], "window": 252}}
        if is_sepllm
        else {},
        **arguments,
    ).create_engine_config()


class SchedulerRig:
    """A scheduler whose requests have all been prefilled and decode step by step."""

    def __init__(self, model: Path, load: Load, *, is_sepllm: bool) -> None:
        """``model`` is a folder with a config.json of a Llama; its weights are not read."""
        self.load = load
        self.config = _vllm_config(model, load, is_sepllm)
        self._random = random.Random(0)
        self.spec = self._spec(is_sepllm)
        # every token of every prompt and answer, and checkpoints, fit
        blocks = load.num_requests * ((load.context + 4096) // BLOCK_SIZE + 256) + 1
        self.config.cache_config.num_gpu_blocks = blocks
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], self.spec)])
        kind = SepLLMScheduler if is_sepllm else Scheduler
        self.scheduler = kind(
            self.config, cache, StructuredOutputManager(self.config), BLOCK_SIZE, log_stats=False
        )
        init_none_hash(sha256)
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        for number in range(load.num_requests):
            request = Request(
                f"cmpl-{number:032x}-0",
                self._tokens(load.context),
                SamplingParams(max_tokens=4096, ignore_eos=True),
                None,
                block_hasher=hasher if load.enable_prefix_caching else None,
            )
            self.scheduler.add_request(request)
        self.finish(self.scheduler.schedule())

    def _spec(self, is_sepllm: bool) -> AttentionSpec:
        model = self.config.model_config
        full = FullAttentionSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=model.get_num_kv_heads(self.config.parallel_config),
            head_size=model.get_head_size(),
            dtype=torch.bfloat16,
        )
        if not is_sepllm:
            return full
        return SepLLMSpec.from_full_attention(full, read_config(self.config).policy)

    def _tokens(self, num_tokens: int) -> list[int]:
        is_separator = (self._random.random() < self.load.density for _ in range(num_tokens))
        return [SEPARATOR if yes else self._random.randrange(2, 100) for yes in is_separator]

    def watch_plans(self, around: Callable[[Planner, SchedulerOutput], StepPlan]) -> None:
        """Have each step planned by ``around(plan, output)``; the scheduler must be ours."""
        scheduler = self.scheduler
        assert isinstance(scheduler, SepLLMScheduler), "vLLM's own scheduler plans nothing"
        plan = scheduler.plan_step
        setattr(scheduler, plan.__name__, lambda output: around(plan, output))

    def finish(self, output: SchedulerOutput) -> None:
        """What the engine does after a forward: a random token for every scheduled request."""
        names = list(output.num_scheduled_tokens)
        sampled = [[token] for token in self._tokens(len(names))]
        rows = {name: row for row, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))


class BuilderRig:
    """The CPU builders of both sides over the batch of a rig's scheduler."""

    def __init__(self, rig: SchedulerRig) -> None:
        config = rig.config
        self._ids = list(rig.scheduler.requests)
        self._step = CurrentStep()
        self.builder = CPUBuilderMixin(rig.spec, [], config, torch.device("cpu"))
        self.builder.bind(self._step, lambda common: self._ids, 0, BLOCK_SIZE, [])
        self._blocks = rig.scheduler.kv_cache_manager
        longest = config.model_config.max_model_len
        self._table = torch.zeros(len(self._ids), longest // BLOCK_SIZE, dtype=torch.int32)

    def common(self) -> CommonAttentionMetadata:
        """The batch as vLLM's model runner describes a decode step of all requests."""
        held = [self._blocks.get_block_ids(name)[0] for name in self._ids]
        for row, ids in enumerate(held):
            self._table[row, : len(ids)] = torch.tensor(ids)
        first = torch.arange(len(held) + 1, dtype=torch.int32)
        lengths = torch.tensor([len(ids) * BLOCK_SIZE for ids in held], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=first,
            query_start_loc_cpu=first,
            seq_lens=lengths,
            num_reqs=len(held),
            num_actual_tokens=len(held),
            max_query_len=1,
            max_seq_len=int(lengths.max()),
            block_table_tensor=self._table,
            slot_mapping=torch.zeros(len(held), dtype=torch.int64),
        )

    def build(self, output: SchedulerOutput, common: CommonAttentionMetadata) -> None:
        """Our metadata of the step."""
        with self._step.of(output):
            self.builder.build(0, common)

    def plan_for_gpu(self, output: SchedulerOutput) -> None:
        """What the GPU builder computes of the same step; its uploads and launches need a GPU."""
        with self._step.of(output):
            rows = self._step.rows(self._ids, 0)
            num_rows = len(self._ids)
            plan_batch(rows, np.arange(num_rows + 1), num_rows, BLOCK_SIZE)

    def build_wrapped(self, common: CommonAttentionMetadata) -> None:
        """vLLM's own metadata for the same cache: what any backend pays."""
        CPUAttentionMetadataBuilder.build(self.builder, 0, common)
