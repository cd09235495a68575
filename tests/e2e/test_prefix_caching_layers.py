"""Prefix caching where SepLLM layers and layers of other kinds must agree on one hit."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Answer, Watch, assert_same, engine
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import tiny_text, write_weights
from tests.support.workload import workload

pytestmark = pytest.mark.slow

BLOCK = 32


def kinds_of(made: Any) -> list[str]:
    return sorted(type(m).__name__ for m in made.managers)


def run_rounds(
    path: Path, rounds: list[list[list[int]]], kinds: list[str], **arguments: Any
) -> dict[bool, list[list[Answer]]]:
    """Answers with caching off and on; hits end at block boundaries and are in the metrics."""
    results = {}
    for caching in (False, True):
        with engine(path, **arguments, enable_prefix_caching=caching) as made:
            assert kinds_of(made) == kinds
            assert made.scheduler.kv_cache_manager.enable_caching is caching
            results[caching] = [made.generate(prompts, 24) for prompts in rounds]
    hits = [a.num_cached_tokens for answers in results[True] for a in answers]
    total = sum(len(p) for prompts in rounds for p in prompts)
    print(f"{sum(hits)} of {total} prompt tokens were hits")
    assert all(hit % BLOCK == 0 for hit in hits)
    assert sum(hits) > 0.3 * total
    for with_cache, without in zip(results[True], results[False], strict=True):
        assert_same(with_cache, without)
    return results


def test_answers_with_full_layers_are_those_without_caching(tmp_path: Path) -> None:
    """Proves it over random shared prefixes: one hit for full attention and SepLLM layers."""
    run_rounds(
        write_weights("llama-four-layers", tmp_path),
        workload(seed=2, num_rounds=3),
        ["FullAttentionManager", "SepLLMManager"],
        **tiny_sepllm(window=60, full_layers=[0, -1]),
        max_num_batched_tokens=256,
        max_model_len=1024,
    )


def test_answers_of_a_sliding_window_hybrid_are_those_without_caching(tmp_path: Path) -> None:
    """Proves it for a tiny random Gemma 2: sliding layers of 64 beside SepLLM layers."""
    run_rounds(
        write_weights("gemma2", tmp_path),
        workload(seed=3, num_rounds=3),
        ["SepLLMManager", "SlidingWindowManager"],
        **tiny_sepllm(window=28),
        max_num_batched_tokens=128,
        max_model_len=1024,
    )


def test_chats_with_full_layers_reuse_what_stock_reuses(tmp_path: Path) -> None:
    """Proves 6 turns of 2 chats, preempted in between: equal answers, and stock vLLM's hits.

    Stock vLLM finds all whole blocks that the turn before computed; all but its last token. With
    one layer of four full, vLLM makes three KV cache groups of the others.
    """
    common = {"max_model_len": 1024, "max_num_batched_tokens": 256, "block_size": BLOCK}
    ours = tiny_sepllm(window=60, full_layers=[0], max_separators=100)
    model = write_weights("llama-four-layers", tmp_path)
    chats = [tiny_text(0, 150), tiny_text(3000, 90)]
    turns: list[list[list[int]]] = []
    expected: list[Answer] = []
    with engine(model, **common, **ours, enable_prefix_caching=False) as made:
        for turn in range(6):
            turns.append(chats)
            answers = made.generate(chats, 40)
            expected += answers
            news = tiny_text(7000 + 100 * turn, 25)
            chats = [[*c, *a.token_ids, *news] for c, a in zip(chats, answers, strict=True)]
        assert kinds_of(made) == ["FullAttentionManager", *["SepLLMManager"] * 3]
    hits = {}
    for name, pool in {"roomy": {}, "tight": {"num_gpu_blocks_override": 55}}.items():
        watch = Watch()
        with engine(model, **common, **ours, **pool) as made:
            answers = [a for prompts in turns for a in made.generate(prompts, 40, watch=watch)]
        hits[name] = sum(a.num_cached_tokens for a in answers)
        print(f"{name}: {hits[name]} tokens were hits, {watch.num_preemptions} preemptions")
        assert_same(answers, expected)
        assert (watch.num_preemptions > 0) is (name == "tight")
    before = [len(c) + 40 - 1 for prompts in turns[:-1] for c in prompts]
    assert hits["roomy"] == sum(n // BLOCK * BLOCK for n in before)
