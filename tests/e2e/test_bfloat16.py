"""bfloat16 costs sepllm no more accuracy than it costs stock vLLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine import engine, sepllm
from tests.support.measured import Number
from tests.support.oracle import Rule, rule_of, scores

pytestmark = pytest.mark.slow


def mean_error(
    path: Path, prompts: list[list[int]], logprobs: list[list[float]], rule: Rule | None
) -> float:
    """Mean |log-probability - float32 oracle| over all prompt tokens."""
    errors = []
    for prompt, own in zip(prompts, logprobs, strict=True):
        errors.append((scores(path, prompt, rule) - torch.tensor(own)).abs())
    return float(torch.cat(errors).mean())


@pytest.mark.compatibility("bfloat16", "the error of stock vLLM")
def test_bfloat16_error_is_that_of_stock_vllm(
    smollm2_path: Path, excerpt: Callable[[int, int], list[int]], number: Number
) -> None:
    """Proves error(sepllm, bf16) <= 1.5 error(stock, bf16), each against its float32 oracle."""
    prompts = [excerpt(0, 700), excerpt(9000, 500)]

    def run(**arguments: Any) -> tuple[list[list[float]], Rule | None]:
        with engine(smollm2_path, dtype="bfloat16", block_size=32, **arguments) as made:
            answers = made.generate(prompts, 1, prompt_logprobs=0)
            is_ours = "attention_backend" in arguments
            return [a.prompt_logprobs for a in answers], rule_of(made) if is_ours else None

    stock = mean_error(smollm2_path, prompts, *run(enable_prefix_caching=False))
    ours = mean_error(smollm2_path, prompts, *run(**sepllm(window=252, separators="extended")))
    number("mean error", f"{ours:.4f} with sepllm, {stock:.4f} with stock vLLM")
    assert ours <= 1.5 * stock
