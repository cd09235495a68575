"""Prefix caching: checkpoints change how fast an answer comes, never the answer."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine, Watch, assert_same, engine

pytestmark = pytest.mark.slow


def sepllm(**config: Any) -> dict[str, Any]:
    return {"attention_backend": "sepllm", "additional_config": {"sepllm": config}}


def workload(
    excerpt: Callable[[int, int], list[int]], seed: int, num_rounds: int = 5
) -> list[list[list[int]]]:
    """Rounds of prompts: shared prefixes cut anywhere, continuations, resends."""
    pick = random.Random(seed)
    rounds: list[list[list[int]]] = []
    known: list[list[int]] = [excerpt(0, 700)]
    for _ in range(num_rounds):
        prompts = []
        for _ in range(4):
            base = pick.choice(known)
            cut = pick.choice([31, 32, 33, 63, 64, 65, 96, 100, 300, 520, len(base)])
            suffix = excerpt(pick.randrange(1000, 20000), pick.choice([1, 5, 40, 200]))
            prompts.append([*base[:cut], *suffix])
        prompts.append(list(pick.choice(known)))
        known += prompts
        rounds.append(prompts)
    return rounds


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
    four_layers_path: Path,
    excerpt: Callable[[int, int], list[int]],
    config: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    """Proves it over random shared prefixes, with eviction, and with a tail that wraps."""
    rounds = workload(excerpt, seed=1)
    common = {**sepllm(**config), **arguments, "max_model_len": 1024}
    results = {}
    for caching in (False, True):
        with engine(four_layers_path, **common, enable_prefix_caching=caching) as made:
            results[caching] = [made.generate(prompts, 40) for prompts in rounds]
    assert not any(a.num_cached_tokens for answers in results[False] for a in answers)
    hits = sum(a.num_cached_tokens for answers in results[True] for a in answers)
    total = sum(len(p) for prompts in rounds for p in prompts)
    print(f"{hits} of {total} prompt tokens were hits")
    # 23 blocks forget nearly everything between two rounds
    assert hits > (0.02 if arguments.get("num_gpu_blocks_override") else 0.4) * total
    for with_cache, without in zip(results[True], results[False], strict=True):
        assert_same(with_cache, without)


def test_chats_with_their_own_answers_are_those_without_caching(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves it for 6 turns of 3 chats at once, preempted in between, two of them twins."""
    common = {**sepllm(window=60, max_separators=60), "max_model_len": 1024}
    common |= {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 128}
    results = {}
    for caching in (False, True):
        watch = Watch()
        with engine(four_layers_path, **common, enable_prefix_caching=caching) as made:
            chats = [excerpt(0, 150), excerpt(0, 150), excerpt(3000, 90)]
            results[caching] = []
            for turn in range(6):
                answers = made.generate(chats, 40, watch=watch)
                results[caching] += answers
                news = excerpt(7000 + 100 * turn, 25)
                chats = [[*c, *a.token_ids, *news] for c, a in zip(chats, answers, strict=True)]
    hits = sum(a.num_cached_tokens for a in results[True])
    print(f"{hits} tokens were hits, {watch.num_preemptions} preemptions")
    assert hits > 500
    assert watch.num_preemptions > 0
    assert_same(results[True], results[False])


def test_requests_whose_tail_becomes_a_ring_stop_sharing_it(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves it where nearly every token is a separator: each is preempted once, and no more."""
    config = {"window": 60, "separators": list(range(5000)), "max_separators": 250}
    common = {**sepllm(**config), "max_model_len": 1024}
    shared = excerpt(0, 140)
    rounds = [[shared], [[*shared, *excerpt(3000 + 50 * i, 5 + i)] for i in range(4)]]
    results, watches = {}, {}
    for caching in (False, True):
        watches[caching] = Watch()
        with engine(four_layers_path, **common, enable_prefix_caching=caching) as made:
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
        answers = [a for prompts in rounds for a in made.generate(prompts, 16)]
        blocks = made.scheduler.kv_cache_manager.block_pool.blocks
        num_cached = sum(b.block_hash is not None for b in blocks)
    return sum(a.num_cached_tokens for a in answers), num_cached


def compare_reuse(path: Path, rounds: list[list[list[int]]], name: str) -> None:
    """sepllm gets a pool of 40 % of the blocks that stock vLLM has cached at the end."""
    stock, num_stock_blocks = run_trace(path, rounds, 4000, enable_prefix_caching=True)
    pool = int(0.4 * num_stock_blocks)
    ours, _ = run_trace(path, rounds, pool, **sepllm(max_separators=1400))
    print(
        f"{name}: {ours} of stock vLLM's {stock} reused tokens, {pool} of {num_stock_blocks} blocks"
    )
    assert ours >= 0.85 * stock


def test_common_system_prompt_is_reused_in_fewer_blocks(
    tiny_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves >= 85 % of stock's reuse in <= 40 % of its blocks: 64 requests, 4K in common."""
    system = excerpt(0, 4000)  # no multiple of any interval
    prompts = [[*system, *excerpt(5000 + 400 * i, 60 + 5 * i)] for i in range(64)]
    compare_reuse(tiny_path, [[p] for p in prompts], "64 requests with a common 4K prompt")


def test_chat_of_six_turns_is_reused_in_fewer_blocks(
    tiny_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves the same for three chats whose every turn begins with all turns before."""
    chats: list[list[int]] = [[], [], []]
    rounds = []
    for turn in range(6):
        for number, chat in enumerate(chats):
            chat += excerpt(4000 * number + 1300 * turn, 1300)
            rounds.append([list(chat)])
    compare_reuse(tiny_path, rounds, "three chats of six turns")


def test_a_hit_is_answered_faster_than_a_miss(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves that reuse saves time: first token of a 3K prompt, seen and not seen before."""

    def seconds(made: Engine, prompt: list[int]) -> float:
        start = time.perf_counter()
        made.generate([prompt], 1)
        return time.perf_counter() - start

    ratios = {}
    for name, arguments in (("stock", {"block_size": 32}), ("sepllm", sepllm())):
        with engine(four_layers_path, **arguments, max_model_len=4096) as made:
            made.generate([excerpt(20000, 600)], 2)  # warm up
            pairs = []
            for i in range(3):
                prompt = excerpt(3100 * i, 3000)
                pairs.append((seconds(made, prompt), seconds(made, prompt)))
        ratios[name] = sorted(hit / miss for miss, hit in pairs)[1]
    print(f"time to first token, hit / miss (median of 3): {ratios}")
    assert ratios["sepllm"] < 0.5
