"""Requests that choose their own policy in real vLLM, each against the oracle with its own mask."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.engine import Engine, Watch, engine, sepllm
from tests.support.oracle import TOLERANCE, differences, rule_of
from vllm_sepllm.integration.frontend.request_choices import RequestCheck

pytestmark = pytest.mark.slow

WINDOW, NEW, POOL = 60, 160, 40
# what requests ask for, and the window that it means; None: full attention
CHOICES: list[tuple[dict[str, Any] | None, int | None]] = [
    ({"sepllm": False}, None),
    (None, WINDOW),
    ({"sepllm_window": 28}, 28),
    ({"sepllm_window": 188, "sepllm": True}, 188),
]


@pytest.fixture(scope="module")
def made(four_layers_path: Path) -> Iterator[Engine]:
    """Short chunks, prefix caching, and a pool that has too little room for all of a batch."""
    with engine(
        four_layers_path,
        **sepllm(window=WINDOW, separators="extended"),
        max_model_len=2048,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=POOL,
    ) as made:
        yield made


@pytest.mark.compatibility(
    "A policy per request (`sepllm_window`, `sepllm`), mixed in a batch", "exact, nothing shared"
)
def test_each_request_has_the_mask_that_it_asked_for(
    made: Engine, four_layers_path: Path, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves that one prompt under four policies in one batch is exact for each of them.

    With chunks, preemption and prefix caching: no policy finds what another left, each finds its
    own. Every answer would fail against the masks of the other three.
    """
    text, other = excerpt(3000, 600), excerpt(9000, 300)
    prompts, choices = [text] * 4 + [other] * 4, [given for given, _ in CHOICES] * 2
    watch = Watch()
    answers = made.generate(prompts, NEW, watch=watch, choices=choices)
    cached = [answer.num_cached_tokens for answer in answers]
    print(f"{watch.num_preemptions} preemptions, {cached} cached")
    assert watch.num_preemptions > 0
    rules = [
        None if window is None else replace(rule_of(made), window=window) for _, window in CHOICES
    ]
    for number in range(len(answers)):
        for mine, rule in enumerate(rules):
            compared = prompts[number : number + 1], answers[number : number + 1]
            num_other, largest = differences(four_layers_path, *compared, rule)
            if mine == number % 4:
                assert num_other == 0
                assert largest < TOLERANCE
            else:
                assert largest > 30 * TOLERANCE
    assert made.llm.reset_prefix_cache()
    for given, _ in CHOICES:
        for is_again in (False, True):
            (answer,) = made.generate([text], 4, choices=[given])
            assert (answer.num_cached_tokens > 500) is is_again, f"{given}: shared or not found"


def test_what_cannot_be_served_is_refused(
    made: Engine, excerpt: Callable[[int, int], list[int]]
) -> None:
    """Proves a ValueError offline, and behind that check an end instead of endless waiting."""
    text = excerpt(0, 600)
    for given, num_tokens, sentence in (
        ({"sepllm_window": 8}, 4, "sepllm_window must be at least 16 here, got 8"),
        ({"sepllm_initial_tokens": -1}, 4, "sepllm_initial_tokens must be at least 0 here, got -1"),
        ({"sepllm_initial_tokens": 1900}, 1400, "needs up to 63 KV blocks .* the engine has 39"),
        ({"sepllm_size": 64}, 4, "unknown key 'sepllm_size'"),
        ({"sepllm": False}, 1400, "needs up to 63 KV blocks .* the engine has 39"),
    ):
        with pytest.raises(ValueError, match=sentence):
            made.generate([text], num_tokens, choices=[given])
    assert not made.engine.has_unfinished_requests()
    # what a front end of another kind lets through
    with patch.object(RequestCheck, "check"):
        (unfit,) = made.generate([text], 1400, choices=[{"sepllm": False}])
        unknown, fine = made.generate([text] * 2, 4, choices=[{"sepllm_size": 64}, None])
    assert unfit.token_ids == unknown.token_ids == []
    assert len(fine.token_ids) == 4
