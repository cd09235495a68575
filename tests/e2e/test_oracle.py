"""Greedy tokens and log-probabilities of the engine equal those of the oracle, token by token."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.compatibility import exact
from tests.support.engine import engine
from tests.support.measured import Number
from tests.support.oracle import TOLERANCE, differences, rule_of

pytestmark = pytest.mark.slow

MAX_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """A policy, how the engine is set up, and the prompts that share a batch.

    ``initial_tokens`` are what each request chooses; empty: all have the policy's. ``feature`` is
    what the case shows beside the policy, for docs/compatibility.md.
    """

    name: str
    sepllm: dict[str, Any]
    max_num_batched_tokens: int
    block_size: int = 32
    all_layers: bool = False
    # together more than any chunk, and several times any window
    prompt_lengths: tuple[int, ...] = (400, 57, 900, 1300)
    initial_tokens: tuple[int, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    feature: str | None = None


CASES = [
    Case("window 64, chunks of 128", {"window": 64, "separators": "extended"}, 128),
    Case("window 256, chunks of 512", {"window": 256, "separators": "extended"}, 512),
    Case(
        "no initial tokens, blocks of 128",
        {"window": 64, "initial_tokens": 0, "separators": "extended"},
        512,
        128,
    ),
    Case(
        "3 initial tokens, paper separators, chunks of 2048",
        {"window": 256, "initial_tokens": 3, "separators": "paper"},
        2048,
        128,
    ),
    Case(
        "few separators",
        {"window": 64, "initial_tokens": 3, "separators": "extended", "max_separators": 24},
        2048,
    ),
    Case(
        "few separators, first and last layer full",
        {
            "window": 256,
            "initial_tokens": 0,
            "separators": "extended",
            "max_separators": 16,
            "full_layers": [0, -1],
        },
        128,
    ),
    Case(
        "initial tokens per request, first and last layer full",
        {"window": 64, "separators": "extended", "full_layers": [0, -1]},
        128,
        prompt_lengths=(400, 57, 700),
        initial_tokens=(150, 300, 0),
    ),
    Case(
        "streaming-llm",
        {"window": 64, "preset": "streaming-llm"},
        512,
        feature='No separators (StreamingLLM\'s mask, `preset: "streaming-llm"`)',
    ),
    Case(
        "every 7th token",
        {"window": 64, "preset": "fixed-interval", "interval": 7},
        512,
        prompt_lengths=(57, 700),
        feature='Every so many tokens a separator (`preset: "fixed-interval"`)',
    ),
    Case(
        "rule of two tokens, cut anywhere",
        {"window": 64, "separators": "unwrapped"},
        67,
        prompt_lengths=(500, 57, 900),
    ),
    Case(
        "compiled",
        {"window": 64, "separators": "extended"},
        512,
        prompt_lengths=(57, 500),
        engine={"enforce_eager": False},
        feature="`torch.compile`",
    ),
    Case(
        "30 layers, first and last full",
        {"window": 64, "separators": "extended", "full_layers": [0, -1]},
        512,
        all_layers=True,
        prompt_lengths=(400, 57, 700),
        feature="Full layers (`full_layers`)",
    ),
    Case(
        "30 layers, defaults",
        {},
        1024,
        all_layers=True,
        prompt_lengths=(600, 1300),
        feature="`--enforce-eager`, the default policy",
    ),
]


@pytest.mark.parametrize("case", [*map(exact, CASES)])
def test_engine_equals_the_dense_mask(
    case: Case,
    smollm2_path: Path,
    four_layers_path: Path,
    excerpt: Callable[[int, int], list[int]],
    number: Number,
) -> None:
    """Proves the exact SepLLM mask in real vLLM, and that full attention would be noticed."""
    path = smollm2_path if case.all_layers else four_layers_path
    prompts = [excerpt(1500 * i, n) for i, n in enumerate(case.prompt_lengths)]
    with engine(
        path,
        attention_backend="sepllm",
        additional_config={"sepllm": case.sepllm},
        max_num_batched_tokens=case.max_num_batched_tokens,
        block_size=case.block_size,
        **case.engine,
    ) as made:
        rule = rule_of(made)
        choices = [{"sepllm_initial_tokens": a} for a in case.initial_tokens] or None
        answers = made.generate(prompts, MAX_TOKENS, choices=choices)
    assert all(len(a.token_ids) == MAX_TOKENS for a in answers)
    num_other, largest = 0, 0.0
    initial_tokens = case.initial_tokens or [rule.initial_tokens] * len(prompts)
    for prompt, answer, a in zip(prompts, answers, initial_tokens, strict=True):
        found = differences(path, [prompt], [answer], replace(rule, initial_tokens=a))
        num_other, largest = num_other + found[0], max(largest, found[1])
    num_tokens = len(prompts) * MAX_TOKENS
    number("differences", f"{num_other} of {num_tokens} tokens, log-probabilities {largest:.1e}")
    assert num_other == 0
    assert largest < TOLERANCE
    # the same check against full attention must fail, by far; the longest prompt tells
    num_other, largest = differences(path, prompts[-1:], answers[-1:], None)
    print(f"{case.name}, full attention: {num_other} differ, by {largest:.1e}")
    assert num_other > 0
    assert largest > 100 * TOLERANCE
