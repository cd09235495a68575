"""Prefix caching: checkpoints change how fast an answer comes, never the answer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import Answer, engine

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # float32; other chunks sum in another order


def sepllm(**config: Any) -> dict[str, Any]:
    return {"attention_backend": "sepllm", "additional_config": {"sepllm": config}}


def assert_same(answers: list[Answer], others: list[Answer]) -> None:
    for answer, other in zip(answers, others, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def workload(excerpt: Callable[[int, int], list[int]], seed: int) -> list[list[list[int]]]:
    """Rounds of prompts: shared prefixes cut anywhere, continuations, resends."""
    pick = random.Random(seed)
    rounds: list[list[list[int]]] = []
    known: list[list[int]] = [excerpt(0, 700)]
    for _ in range(5):
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
        ({"window": 60}, {"max_num_batched_tokens": 128, "num_gpu_blocks_override": 70}),
        ({"window": 50, "initial_tokens": 3, "max_separators": 12}, {"max_num_batched_tokens": 256}),
        ({"window": 64, "checkpoint_interval": 32}, {"max_num_batched_tokens": 512}),
    ],
    ids=["roomy", "small pool", "tail wraps", "dense checkpoints"],
)
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
    hits = sum(a.num_cached_tokens for answers in results[True] for a in answers)
    total = sum(len(p) for prompts in rounds for p in prompts)
    print(f"{hits} of {total} prompt tokens were hits")
    assert hits > 0.2 * total
    for with_cache, without in zip(results[True], results[False], strict=True):
        assert_same(with_cache, without)
