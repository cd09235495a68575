"""One of our schedulers over vLLM's real block pool; a test says what its requests sample."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.tiny_configs import llama_config
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.policy.visibility import Policy

BLOCK = 32
SEPARATOR = 1
Kind = TypeVar("Kind", bound=Scheduler)
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)


def make_scheduler(
    kind: type[Kind], folder: Path, policy: Policy, num_blocks: int, **arguments: Any
) -> Kind:
    """A scheduler of the tiny Llama with one KV cache group; ``arguments`` are EngineArgs'."""
    llama_config(vocab_size=128, max_position_embeddings=8192).save_pretrained(folder)
    settings = {
        "separators": [SEPARATOR],
        "initial_tokens": policy.initial_tokens,
        "window": policy.window,
        "max_separators": policy.max_separators,
    }
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        attention_backend="sepllm",
        additional_config={"sepllm": settings},
        **arguments,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    group = KVCacheGroupSpec(["layer"], SepLLMSpec.from_full_attention(FULL, policy))
    cache = KVCacheConfig(num_blocks, [], [group])
    return kind(config, cache, StructuredOutputManager(config), BLOCK, log_stats=False)


def make_request(
    name: str, prompt: list[int], max_tokens: int, stop: Sequence[int] = (), **fields: Any
) -> Request:
    """A request as the engine core makes it, with hashes for the prefix cache."""
    init_none_hash(sha256)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[*stop])
    hasher = get_request_block_hasher(BLOCK, sha256)
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
