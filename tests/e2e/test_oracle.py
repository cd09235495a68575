"""Greedy tokens and log-probabilities of the engine equal those of the oracle, token by token."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine import Answer, engine
from tests.support.oracle import Rule, log_probabilities

pytestmark = pytest.mark.slow

MAX_TOKENS = 64
# float32 on both sides; what remains is the order of sums. Design: 3e-5 over 30 layers.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A policy, how the engine is set up, and the prompts that share a batch."""

    name: str
    sepllm: dict[str, Any]
    max_num_batched_tokens: int
    block_size: int = 32
    all_layers: bool = False
    prompt_lengths: tuple[int, ...] = (500, 57, 1250, 2200)
    engine: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("window 64, chunks of 128", {"window": 64}, 128),
    Case("window 256, chunks of 512", {"window": 256}, 512),
    Case("no initial tokens, blocks of 128", {"window": 64, "initial_tokens": 0}, 512, 128),
    Case(
        "3 initial tokens, paper separators, chunks of 2048",
        {"window": 256, "initial_tokens": 3, "separators": "paper"},
        2048,
        128,
    ),
    Case(
        "few separators",
        {"window": 64, "initial_tokens": 3, "max_separators": 24},
        2048,
    ),
    Case(
        "few separators, first and last layer full",
        {"window": 256, "initial_tokens": 0, "max_separators": 16, "full_layers": [0, -1]},
        128,
    ),
    Case("streaming-llm", {"window": 64, "preset": "streaming-llm"}, 512),
    Case(
        "every 7th token",
        {"window": 64, "preset": "fixed-interval", "interval": 7},
        512,
        prompt_lengths=(57, 700),
    ),
    Case(
        "rule of two tokens, cut anywhere",
        {"window": 64, "separators": "unwrapped"},
        67,
        prompt_lengths=(500, 57, 900),
    ),
    Case(
        "compiled",
        {"window": 64},
        512,
        prompt_lengths=(57, 500),
        engine={"enforce_eager": False},
    ),
    Case(
        "30 layers, first and last full",
        {"window": 64, "full_layers": [0, -1]},
        512,
        all_layers=True,
        prompt_lengths=(500, 57, 900),
    ),
    Case("30 layers, defaults", {}, 2048, all_layers=True, prompt_lengths=(700, 1600)),
]


def rule_of(made: Any) -> Rule:
    """What the engine says it does, for the oracle."""
    config = made.engine.vllm_config.additional_config["sepllm"]
    separators = config.get("separators", ())
    if not isinstance(separators, dict):
        separators = {"token_ids": separators, "line_breaks": (), "closers": ()}
    return Rule(
        initial_tokens=config["initial_tokens"],
        window=config["window"],
        separator_ids=frozenset(separators["token_ids"]),
        line_breaks=frozenset(separators["line_breaks"]),
        closers=frozenset(separators["closers"]),
        max_separators=config["max_separators"],
        full_layers=frozenset(config["full_layers"]),
        interval=config.get("interval"),
    )


def differences(
    path: Path, prompts: list[list[int]], answers: list[Answer], rule: Rule | None
) -> tuple[int, float]:
    """How many tokens the oracle would have chosen otherwise; the largest log-prob. difference."""
    num_other, largest = 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = prompt + answer.token_ids
        logprobs = log_probabilities(path, tokens[:-1], rule, len(prompt) - 1)
        chosen = torch.tensor(answer.token_ids)
        num_other += int((logprobs.argmax(dim=-1) != chosen).sum())
        own = logprobs[torch.arange(len(chosen)), chosen]
        largest = max(largest, float((own - torch.tensor(answer.logprobs)).abs().max()))
    return num_other, largest


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """What the case shows beside the policy."""
    titles = {
        "compiled": "`torch.compile`",
        "30 layers, defaults": "`--enforce-eager`, the default policy",
        "30 layers, first and last full": "Full layers (`full_layers`)",
        "no separators": "No separators (StreamingLLM's mask)",
    }
    title = titles.get(case.name)
    return [pytest.mark.compatibility(title, "exact")] if title else []


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=marks(c)) for c in CASES], ids=[c.name for c in CASES]
)
def test_engine_equals_the_dense_mask(
    case: Case,
    smollm2_path: Path,
    four_layers_path: Path,
    excerpt: Callable[[int, int], list[int]],
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
        answers = made.generate(prompts, MAX_TOKENS)
    assert all(len(a.token_ids) == MAX_TOKENS for a in answers)
    num_other, largest = differences(path, prompts, answers, rule)
    print(f"{case.name}: {num_other} tokens differ, log-probabilities by {largest:.1e}")
    assert num_other == 0
    assert largest < TOLERANCE
    # the same check against full attention must fail, by far; the longest prompt tells
    num_other, largest = differences(path, prompts[-1:], answers[-1:], None)
    print(f"{case.name}, full attention: {num_other} differ, by {largest:.1e}")
    assert num_other > 0
    assert largest > 100 * TOLERANCE
