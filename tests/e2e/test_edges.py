"""Requests at the edges: of the model's length, of the pool, of what a cached prefix shares."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine, Watch, assert_same, engine
from tests.support.oracle import TOLERANCE, differences, rule_of
from tests.support.rule import num_kept
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import SEPARATORS, tiny_text
from vllm_sepllm.policy.visibility import Policy

pytestmark = pytest.mark.slow

BLOCK = 32
# a + n is two blocks
POLICY = Policy(4, 60, 200)
INTERVAL = 128
LENGTH = 512
SEPLLM = tiny_sepllm(
    window=POLICY.window, max_separators=POLICY.max_separators, checkpoint_interval=INTERVAL
)


@pytest.fixture(scope="module")
def made(tiny_llama_path: Path) -> Iterator[Engine]:
    with engine(
        tiny_llama_path,
        **SEPLLM,
        max_model_len=LENGTH,
        max_num_batched_tokens=256,
        scheduling_policy="priority",
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def _empty(made: Engine) -> None:
    assert made.llm.reset_prefix_cache()


def check(made: Engine, path: Path, prompts: list[list[int]], num_tokens: int = 4) -> int:
    """One request after the other, twice: the second time from the prefix cache.

    Returns how many tokens it held.
    """
    for _ in range(2):
        answers = [made.generate([prompt], num_tokens)[0] for prompt in prompts]
        num_other, largest = differences(path, prompts, answers, rule_of(made))
        assert num_other == 0
        assert largest < TOLERANCE
    return sum(answer.num_cached_tokens for answer in answers)


@pytest.mark.parametrize("is_cut_first", [False, True])
@pytest.mark.parametrize("edge", [BLOCK, POLICY.num_dense, INTERVAL, 320])
def test_prefixes_part_beside_an_edge(
    made: Engine, tiny_llama_path: Path, edge: int, is_cut_first: bool
) -> None:
    """Proves it for the edges of blocks, of a + n and of checkpoints, in either order."""
    whole = tiny_text(0, 400)
    cuts = [whole[: edge + i] + tiny_text(3000 * (i + 2), 50) for i in (-1, 0, 1)]
    prompts = [*cuts, whole] if is_cut_first else [whole, *cuts]
    assert check(made, tiny_llama_path, prompts) >= sum(len(prompt) for prompt in prompts) // 2


@pytest.mark.compatibility("Requests as long as the model's length", "as stock vLLM")
def test_lengths_beside_the_length_of_the_model(made: Engine, tiny_llama_path: Path) -> None:
    """Proves that the last token fits, and that longer ones are refused and harm nobody."""
    from vllm.exceptions import VLLMValidationError

    prompt = tiny_text(0, LENGTH + 1)
    check(made, tiny_llama_path, [prompt[: LENGTH - 1]], 1)
    for length in (LENGTH, LENGTH + 1):
        with pytest.raises(VLLMValidationError, match=str(LENGTH)):
            made.generate([prompt[:length]], 1)
    check(made, tiny_llama_path, [prompt[: LENGTH - 4]], 4)


def test_a_salt_that_spells_another_policy_shares_nothing(made: Engine) -> None:
    """Proves that policies and salts of users cannot be told into each other."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": tiny_text(0, 300)}
    chosen = SamplingParams(max_tokens=4, extra_args={"sepllm_window": 40})
    made.engine.add_request("chosen", prompt, chosen)
    (request,) = made.scheduler.requests.values()
    salt = request.cache_salt
    assert salt, "the policy is in the salt"
    while made.engine.has_unfinished_requests():
        made.engine.step()
    (again,) = made.llm.generate([prompt], chosen)
    assert again.num_cached_tokens > 0
    (output,) = made.llm.generate([prompt | {"cache_salt": salt}], SamplingParams(max_tokens=1))
    assert output.num_cached_tokens == 0


@pytest.mark.compatibility("`reset_prefix_cache(reset_running_requests=True)`", "does not show")
def test_a_reset_with_requests_in_flight_does_not_show(made: Engine) -> None:
    """Proves it in mid-prefill and in mid-decode."""
    prompts = [tiny_text(5000, 350), tiny_text(6000, 90), tiny_text(5000, 300)]
    expected = made.generate(prompts, 20)
    for steps in (1, 2, 12):
        assert made.llm.reset_prefix_cache()
        assert_same(made.generate(prompts, 20, reset_after=steps), expected)


@pytest.mark.compatibility("Priority scheduling", "preempts, does not show")
def test_priorities_preempt_and_do_not_show(made: Engine, tiny_llama_path: Path) -> None:
    """Proves it in a pool for two of twelve requests, of which the last come first."""
    prompts = [tiny_text(900 * i, 40 + 25 * i) for i in range(12)]
    expected = made.generate(prompts, 100)
    watch = Watch()
    with engine(
        tiny_llama_path,
        **SEPLLM,
        max_model_len=LENGTH,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=18,
        scheduling_policy="priority",
    ) as small:
        ranks = list(range(12, 0, -1))
        answers = small.generate(prompts, 100, watch=watch, priorities=ranks)
    assert watch.num_preemptions > 1
    assert_same(answers, expected)


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_separators_alone_in_a_pool_that_just_holds_them(tiny_llama_path: Path, spare: int) -> None:
    """Proves that a pool of exactly the largest request's blocks serves it."""
    prompt = [SEPARATORS[0]] * (LENGTH - 8)
    needed = -(-num_kept(POLICY, [True] * LENGTH, LENGTH) // BLOCK)
    # vLLM keeps one block back
    arguments: dict[str, Any] = SEPLLM | {"num_gpu_blocks_override": needed + 1 + spare}
    arguments |= {"max_model_len": LENGTH, "max_num_batched_tokens": 64}
    if spare < 0:
        with pytest.raises(ValueError, match="KV cache"), engine(tiny_llama_path, **arguments):
            pass
        return
    with engine(tiny_llama_path, **arguments) as made:
        check(made, tiny_llama_path, [prompt], 8)


def test_three_long_prompts_in_a_pool_for_one_and_a_half(tiny_llama_path: Path) -> None:
    """Proves it for 3 x 3,000 tokens in 30 blocks and chunks of 64."""
    prompts = [tiny_text(4000 * i, 3000) for i in range(3)]
    separators = tiny_sepllm(window=60, max_separators=600)
    with engine(
        tiny_llama_path, **separators, num_gpu_blocks_override=31, max_num_batched_tokens=64
    ) as made:
        answers = made.generate(prompts, 8)
        num_other, largest = differences(tiny_llama_path, prompts, answers, rule_of(made))
    assert num_other == 0
    assert largest < TOLERANCE
