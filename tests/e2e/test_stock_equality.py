"""Invariant 4: below initial_tokens + window the engine is stock vLLM, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Answer, engine

pytestmark = pytest.mark.slow

COMMON = {"block_size": 32, "max_num_batched_tokens": 512, "max_model_len": 2048}


def run(path: Path, prompts: list[list[int]], max_tokens: int, **arguments: Any) -> list[Answer]:
    with engine(path, **COMMON, **arguments) as made:
        return made.generate(prompts, max_tokens)


@pytest.mark.compatibility("Requests shorter than the window", "bit for bit stock vLLM")
def test_short_requests_and_wide_windows_equal_stock_vllm(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves equality of tokens and of every bit of the log-probabilities."""
    short = [excerpt(700 * i, n) for i, n in enumerate((1, 31, 100, 192))]
    long = [excerpt(700 * i, n) for i, n in enumerate((63, 500, 1900))]
    stock = run(four_layers_path, short, 64, enable_prefix_caching=False)
    whole = [{"sepllm_initial_tokens": 1800}] * len(long)
    with engine(four_layers_path, **COMMON, attention_backend="sepllm") as made:
        default = made.generate(short, 64)
        initial = made.generate(long, 64, choices=whole)
    assert default == stock
    stock = run(four_layers_path, long, 64, enable_prefix_caching=False)
    assert initial == stock
    wide = run(
        four_layers_path,
        long,
        64,
        attention_backend="sepllm",
        additional_config={"sepllm": {"window": 2048}},
    )
    assert wide == stock


def test_short_requests_equal_stock_vllm_beside_a_long_one(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves that short prompts are answered alike behind the chunk of a long one."""
    short = [excerpt(700 * i, n) for i, n in enumerate((40, 100, 150))]
    with engine(four_layers_path, **COMMON, attention_backend="sepllm") as made:
        alone = made.generate(short, 48)
        mixed = made.generate([excerpt(0, 1500), *short, excerpt(3000, 900)], 48)
    for lone, mate in zip(alone, mixed[1:4], strict=True):
        assert lone.token_ids == mate.token_ids
        assert lone.logprobs == pytest.approx(mate.logprobs, abs=1e-4)
