"""Prefix caching: checkpoints change how fast an answer comes, never the answer."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Watch, assert_same, engine, sepllm
from tests.support.measured import Number
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import tiny_text
from tests.support.workload import workload
from vllm_sepllm.integration.worker.host_blocks import HostBlocks
from vllm_sepllm.policy.step.plan import HostTransfers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"window": 60}, {"max_num_batched_tokens": 512}),
        ({"window": 60}, {"max_num_batched_tokens": 128, "num_gpu_blocks_override": 24}),
        (
            {"window": 50, "initial_tokens": 3, "max_separators": 12},
            {"max_num_batched_tokens": 256},
        ),
        ({"window": 64, "checkpoint_interval": 32}, {"max_num_batched_tokens": 512}),
    ],
    ids=["roomy", "small pool", "tail wraps", "dense checkpoints"],
)
@pytest.mark.compatibility("Prefix caching", "the answers without it")
def test_answers_are_those_without_caching(
    tiny_llama_path: Path,
    config: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    """Proves it over random shared prefixes, with eviction, and with a tail that wraps."""
    rounds = workload(seed=1)
    common = tiny_sepllm(**config) | arguments | {"max_model_len": 1024}
    results = {}
    for caching in (False, True):
        with engine(tiny_llama_path, **common, enable_prefix_caching=caching) as made:
            results[caching] = [made.generate(prompts, 40) for prompts in rounds]
    assert not any(a.num_cached_tokens for answers in results[False] for a in answers)
    hits = sum(a.num_cached_tokens for answers in results[True] for a in answers)
    total = sum(len(p) for prompts in rounds for p in prompts)
    print(f"{hits} of {total} prompt tokens were hits")
    # 23 blocks forget nearly everything between two rounds
    assert hits > (0.02 if arguments.get("num_gpu_blocks_override") else 0.4) * total
    for with_cache, without in zip(results[True], results[False], strict=True):
        assert_same(with_cache, without)


@pytest.mark.compatibility(
    "Host memory for evicted prefixes (`--kv-offloading-size`)", "the answers without it"
)
def test_evicted_prefixes_come_back_from_host_memory(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves it where 23 blocks forget nearly everything between two rounds, and a tail wraps.

    The metrics count the bytes that the worker moves.
    """
    moved, move = Counter[str](), HostBlocks.move

    def count_and_move(self: HostBlocks, transfers: HostTransfers) -> None:
        size = sum(host[0].nbytes for host in self._host)
        moved["saved"] += len(transfers.saves) * size
        moved["restored"] += len(transfers.loads) * size
        move(self, transfers)

    monkeypatch.setattr(HostBlocks, "move", count_and_move)
    rounds = workload(seed=1)
    common = tiny_sepllm(window=60, max_separators=30) | {"max_model_len": 1024}
    common |= {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 128}
    common |= {"disable_log_stats": False}
    results, hits, metrics = {}, {}, {}
    for size in (None, 0.05):
        caching = size is not None
        arguments = common | {"enable_prefix_caching": caching, "kv_offloading_size": size}
        with engine(tiny_llama_path, **arguments) as made:
            results[caching] = [made.generate(prompts, 40) for prompts in rounds]
            hits[caching] = sum(a.num_cached_tokens for each in results[caching] for a in each)
            pool = made.scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            metrics = {m.name: m.value for m in made.llm.get_metrics() if hasattr(m, "value")}
    assert metrics["vllm:sepllm_saved_bytes"] == moved["saved"] > 0
    assert metrics["vllm:sepllm_restored_bytes"] == moved["restored"] > 0
    assert 0 < metrics["vllm:sepllm_host_memory_usage_perc"] <= 1
    total = sum(len(p) for prompts in rounds for p in prompts)
    print(f"{hits[True]} of {total} prompt tokens were hits")
    assert hits[True] > 0.3 * total
    for with_host, without in zip(results[True], results[False], strict=True):
        assert_same(with_host, without)


def test_chats_with_their_own_answers_are_those_without_caching(tiny_llama_path: Path) -> None:
    """Proves it for 6 turns of 4 chats at once, preempted in between, two of them twins."""
    common = tiny_sepllm(window=60, max_separators=60) | {"max_model_len": 1024}
    common |= {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 128}
    results = {}
    for caching in (False, True):
        watch = Watch()
        with engine(tiny_llama_path, **common, enable_prefix_caching=caching) as made:
            chats = [
                tiny_text(0, 150),
                tiny_text(0, 150),
                *(tiny_text(3000 * i, 20) for i in (1, 2)),
            ]
            results[caching] = []
            for turn in range(6):
                answers = made.generate(chats, 40, watch=watch)
                results[caching] += answers
                news = tiny_text(7000 + 100 * turn, 25)
                chats = [[*c, *a.token_ids, *news] for c, a in zip(chats, answers, strict=True)]
    hits = sum(a.num_cached_tokens for a in results[True])
    print(f"{hits} tokens were hits, {watch.num_preemptions} preemptions")
    assert hits > 500
    assert watch.num_preemptions > 0
    assert_same(results[True], results[False])


def test_requests_whose_tail_becomes_a_ring_stop_sharing_it(tiny_llama_path: Path) -> None:
    """Proves it where nearly every token is a separator: each is preempted once, and no more."""
    config = {"window": 60, "separators": list(range(2, 125)), "max_separators": 250}
    common = tiny_sepllm() | sepllm(**config) | {"max_model_len": 1024}
    shared = tiny_text(0, 140)
    rounds = [[shared], [[*shared, *tiny_text(3000 + 50 * i, 5 + i)] for i in range(4)]]
    results, watches = {}, {}
    for caching in (False, True):
        watches[caching] = Watch()
        with engine(tiny_llama_path, **common, enable_prefix_caching=caching) as made:
            results[caching] = [
                made.generate(prompts, 200, watch=watches[caching]) for prompts in rounds
            ]
    assert all(a.num_cached_tokens >= 128 for a in results[True][1])
    print(f"{watches[True].num_preemptions} preemptions of {1 + 4} requests")
    assert watches[False].num_preemptions == 0
    assert 0 < watches[True].num_preemptions <= 5
    for with_cache, without in zip(results[True], results[False], strict=True):
        assert_same(with_cache, without)


def run_trace(
    path: Path, rounds: list[list[list[int]]], num_blocks: int, **arguments: Any
) -> tuple[int, int]:
    """Tokens reused over all rounds of prompts, and blocks that hold reusable KV afterwards."""
    with engine(
        path,
        load_format="dummy",
        block_size=32,
        max_model_len=16384,
        max_num_batched_tokens=4096,
        num_gpu_blocks_override=num_blocks,
        **arguments,
    ) as made:
        # answers are not looked at: tokens that are computed behind a prompt, for its last state
        answers = [a for prompts in rounds for a in made.generate(prompts, 4, logprobs=None)]
        blocks = made.scheduler.kv_cache_manager.block_pool.blocks
        num_cached = sum(b.block_hash is not None for b in blocks)
    return sum(a.num_cached_tokens for a in answers), num_cached


def compare_reuse(path: Path, rounds: list[list[list[int]]], number: Number) -> None:
    """sepllm gets a pool of 40 % of the blocks that stock vLLM has cached at the end."""
    stock, num_stock_blocks = run_trace(path, rounds, 4000, enable_prefix_caching=True)
    pool = int(0.4 * num_stock_blocks)
    ours, _ = run_trace(
        path, rounds, pool, **sepllm(window=252, separators="extended", max_separators=1400)
    )
    number("reused tokens", f"{ours} in {pool} blocks, {stock} of stock vLLM in {num_stock_blocks}")
    # stock vLLM finds all whole blocks that it has seen before
    assert stock > 0.6 * sum(len(prompt) for prompts in rounds for prompt in prompts)
    assert ours >= 0.85 * stock


def test_common_system_prompt_is_reused_in_fewer_blocks(
    tiny_path: Path, excerpt: Callable[[int, int], list[int]], number: Number
) -> None:
    """Proves >= 85 % of stock's reuse in <= 40 % of its blocks: 64 requests, 4K in common."""
    system = excerpt(0, 4000)  # no multiple of any interval
    prompts = [[*system, *excerpt(5000 + 400 * i, 60 + 5 * i)] for i in range(64)]
    compare_reuse(tiny_path, [[p] for p in prompts], number)


def test_chat_of_six_turns_is_reused_in_fewer_blocks(
    tiny_path: Path, excerpt: Callable[[int, int], list[int]], number: Number
) -> None:
    """Proves the same for three chats whose every turn begins with all turns before."""
    chats: list[list[int]] = [[], [], []]
    rounds = []
    for turn in range(6):
        for which, chat in enumerate(chats):
            chat += excerpt(4000 * which + 1300 * turn, 1300)
            rounds.append([list(chat)])
    compare_reuse(tiny_path, rounds, number)
