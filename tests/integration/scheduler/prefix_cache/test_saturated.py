"""A prompt's common beginning stays in a full pool, under vLLM's real scheduler and block pool."""

import random
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.tiny_configs import llama_config
from vllm_sepllm.integration.scheduler.scheduler import SepLLMScheduler
from vllm_sepllm.integration.wire.config import read_config
from vllm_sepllm.integration.wire.spec import SepLLMSpec

BLOCK = 32
NUM_COMMON, NUM_OWN, NUM_REQUESTS = 2000, 40, 24
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)


def make_scheduler(folder: Path, num_blocks: int, **settings: int) -> SepLLMScheduler:
    llama_config(vocab_size=128, max_position_embeddings=8192).save_pretrained(folder)
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        max_model_len=8192,
        attention_backend="sepllm",
        additional_config={"sepllm": {"separators": [1], "window": 252, **settings}},
        max_num_batched_tokens=1024,
        max_num_seqs=NUM_REQUESTS,
        async_scheduling=False,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    policy = read_config(config).policy
    group = KVCacheGroupSpec(["layer"], SepLLMSpec.from_full_attention(FULL, policy))
    cache = KVCacheConfig(num_blocks, [], [group])
    return SepLLMScheduler(config, cache, StructuredOutputManager(config), BLOCK, log_stats=False)


def run(scheduler: SepLLMScheduler) -> tuple[list[int], int]:
    """Tokens that each start of a request found in the cache, and most requests at once."""
    pick = random.Random(0)
    num_outputs: dict[str, int] = {}
    hits, most = [], 0
    while scheduler.requests:
        output = scheduler.schedule()
        most = max(most, len(scheduler.running))
        hits += [new.num_computed_tokens for new in output.scheduled_new_reqs]
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            num_outputs.setdefault(name, 0)
            num_outputs[name] += not scheduler.requests[name].is_prefill_chunk
            done = num_outputs[name] >= 30 + 7 * int(name) % 30
            token = 2 if done else pick.randrange(3, 100)
            sampled.append([] if scheduler.requests[name].is_prefill_chunk else [token])
        rows = {name: row for row, name in enumerate(names)}
        scheduler.update_from_output(output, ModelRunnerOutput(names, rows, sampled))
    return hits, most


@pytest.mark.parametrize("max_tokens", [100, 6000])
@pytest.mark.parametrize("num_blocks", [121, 201])
def test_requests_that_begin_alike_find_their_beginning(
    tmp_path: Path, num_blocks: int, max_tokens: int
) -> None:
    """Each needs 9 blocks of its own at least, so the pool is full of running requests.

    However long their answers might be, they share the tail: 7 blocks of 2,000 tokens.
    """
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    scheduler = make_scheduler(tmp_path, num_blocks)
    pick = random.Random(1)

    def text(num_tokens: int) -> list[int]:
        return [1 if pick.random() < 0.13 else pick.randrange(3, 100) for _ in range(num_tokens)]

    common = text(NUM_COMMON)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[2])
    hits, most = [], 0
    for numbers in (range(1), range(1, NUM_REQUESTS)):
        for number in numbers:
            prompt = common + text(NUM_OWN)
            request = Request(str(number), prompt, sampling, None, block_hasher=hasher)
            scheduler.add_request(request)
        found, most = run(scheduler)
        hits += found
    share = sum(hits[1:]) / (NUM_COMMON * (len(hits) - 1))
    print(f"{share:.0%} of the common tokens were found by {len(hits) - 1} starts")
    assert share > 0.9
    print(f"{most} requests at once")
    assert most >= (num_blocks - 20) // 11


@pytest.mark.parametrize("state", list(PauseState))
def test_a_request_near_the_bound_goes_on_while_a_pause_drains(
    tmp_path: Path, state: PauseState
) -> None:
    """Every token is a separator: it is preempted once, and whoever pauses waits for it."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    scheduler = make_scheduler(tmp_path, 201, window=60, max_separators=200)
    sampling = SamplingParams(max_tokens=300, ignore_eos=True)
    request = Request("0", [1] * 40, sampling, None, block_hasher=hasher)
    scheduler.add_request(request)
    num_steps = 0
    while scheduler.requests and num_steps < 400:
        if num_steps == 100:
            scheduler.set_pause_state(state)
        output = scheduler.schedule()
        if not output.num_scheduled_tokens:
            break
        sampled = [[] if request.is_prefill_chunk else [1]]
        scheduler.update_from_output(output, ModelRunnerOutput(["0"], {"0": 0}, sampled))
        num_steps += 1
    if state == PauseState.PAUSED_ALL:
        assert num_steps == 100
        assert scheduler.running == [request]
        return
    assert not scheduler.requests
    assert request.num_preemptions == 1
