"""Requests with initial tokens of their own in real vLLM, each against the oracle with its mask."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Watch, assert_same, engine, sepllm
from tests.support.measured import Number
from tests.support.oracle import TOLERANCE, differences, rule_of

pytestmark = pytest.mark.slow

NEW, END = 48, 2
# a and n of what is asked; the first have a prompt whose prefix of 1500 tokens is protected
ASKED = [(a, n) for a in (1500, 0, 3, 4, 300) for n in (60, 252)]


@pytest.mark.compatibility(
    "Initial tokens per request (`sepllm_initial_tokens`), protected prefixes (`protect`)",
    "exact, mixed in a batch",
)
def test_each_request_has_the_initial_tokens_that_it_asked_for(
    four_layers_path: Path, excerpt: Callable[[int, int], list[int]], number: Number
) -> None:
    """Proves a in {0, 3, 4, 300, 1500} with windows of 60 and 252 in one batch, against the oracle.

    With chunks of 2048, 512 and 128 tokens, with preemption, and from the prefix cache. Batch mates
    that stay below a + n have full attention, and grow until the pool is full.
    """
    text = [token for token in excerpt(3000, 1800) if token != END]
    protected = [*text[:1499], END, *text[1500:1790]]
    mates = [excerpt(8000 + 50 * i, 20 + i) for i in range(10)]
    prompts = [protected, protected, *mates, *[text[: 420 + 31 * i] for i in range(8)]]
    choices: list[dict[str, Any]] = [{"sepllm_window": n} for _, n in ASKED[:2]]
    choices += [{"sepllm_initial_tokens": 300}] * len(mates)
    choices += [{"sepllm_window": n, "sepllm_initial_tokens": a} for a, n in ASKED[2:]]
    watch, rounds, again = Watch(), [], []
    with engine(
        four_layers_path,
        **sepllm(window=252, separators="extended", protect="<|im_end|>", max_protected=1500),
        max_model_len=2048,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=150,
    ) as made:
        rule = rule_of(made)
        for num_tokens in (2048, 512, 128):
            made.scheduler.max_num_scheduled_tokens = num_tokens
            assert made.llm.reset_prefix_cache()
            rounds.append(made.generate(prompts, NEW, watch=watch, choices=choices))
        for row in (0, len(prompts) - 1):
            for _ in range(2):
                again += made.generate([prompts[row]], NEW, choices=[choices[row]])
    cached = [answer.num_cached_tokens for answer in again]
    print(f"{watch.num_preemptions} preemptions, {cached} cached")
    assert watch.num_preemptions > 0
    assert min(cached[1::2]) > 500
    for answers in rounds[1:]:
        assert_same(answers, rounds[0])
    assert_same(again, [*rounds[0][:1] * 2, *rounds[0][-1:] * 2])

    def apart(rows: slice, **own: int) -> tuple[int, float]:
        mine = replace(rule, **own)
        return differences(four_layers_path, prompts[rows], rounds[0][rows], mine)

    num_other, largest = differences(four_layers_path, mates, rounds[0][2:12], None)
    for place, (a, n) in zip([0, 1, *range(12, 20)], ASKED, strict=True):
        row = slice(place, place + 1)
        found = apart(row, initial_tokens=a, window=n)
        num_other, largest = num_other + found[0], max(largest, found[1])
        if n == 60 and a < 1500:  # with other initial tokens it would be another answer
            assert apart(row, initial_tokens=150, window=n)[1] > 30 * TOLERANCE
    num_tokens = len(prompts) * NEW
    number("differences", f"{num_other} of {num_tokens} tokens, log-probabilities {largest:.1e}")
    assert num_other == 0
    assert largest < TOLERANCE
