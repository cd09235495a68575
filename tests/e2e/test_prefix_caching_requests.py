"""Prefix caching as users and operators see it: on by default, counted right, kept apart."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import Engine, assert_same, engine
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import tiny_text

pytestmark = pytest.mark.slow

WINDOW, INTERVAL = 60, 128


@pytest.fixture(scope="module")
def made(tiny_llama_path: Path) -> Iterator[Engine]:
    """One engine with vLLM's own default for prefix caching: on."""
    with engine(
        tiny_llama_path,
        **tiny_sepllm(window=WINDOW, checkpoint_interval=INTERVAL),
        max_model_len=1024,
        max_num_batched_tokens=256,
        disable_log_stats=False,
    ) as made:
        assert made.scheduler.kv_cache_manager.enable_caching
        yield made


@pytest.fixture(autouse=True)
def _empty(made: Engine) -> None:
    assert made.llm.reset_prefix_cache()


def counters(made: Engine) -> tuple[int, int]:
    """vLLM's metrics: tokens looked up, tokens found."""
    values = {m.name: m.value for m in made.llm.get_metrics() if hasattr(m, "value")}
    return values["vllm:prefix_cache_queries"], values["vllm:prefix_cache_hits"]


def cached(made: Engine, *prompts: list[int]) -> list[int]:
    return [made.generate([prompt], 4)[0].num_cached_tokens for prompt in prompts]


def test_hits_are_where_they_should_be_and_counted(made: Engine) -> None:
    """Proves the place of every kind of hit, num_cached_tokens and metrics, and a reset.

    Up to a + n = 64 tokens every block boundary is a hit, as in stock vLLM; beyond, the regular
    checkpoints, the last block of a prompt, the end of a request, and where two prompts parted.
    """
    long, short = tiny_text(0, 400), tiny_text(9000, 50)
    (answer,) = made.generate([long], 4)
    assert made.llm.reset_prefix_cache()
    before = counters(made)
    prompts = {
        "new": (long, 0),
        "the same: last block of the prompt": (long, 384),
        "longer: end of the request": (long + answer.token_ids, 403),
        "parted between checkpoints": (long[:300] + tiny_text(5000, 40), 256),
        "parted there again": (long[:300] + tiny_text(6000, 40), 288),
        "parted early, inside a + n": (long[:40] + tiny_text(7000, 300), 0),
        "short and new": (short, 0),
        "short, parted after one block": (short[:40] + tiny_text(8000, 9), 32),
    }
    answers = {name: cached(made, prompt)[0] for name, (prompt, _) in prompts.items()}
    assert answers == {name: hit for name, (_, hit) in prompts.items()}
    queries, hits = (after - b for after, b in zip(counters(made), before, strict=True))
    assert queries == sum(len(prompt) for prompt, _ in prompts.values())
    assert hits == sum(answers.values())
    assert made.llm.reset_prefix_cache()
    assert cached(made, long, short) == [0, 0]


def test_requests_with_another_cache_salt_share_nothing(made: Engine) -> None:
    """Proves cache_salt end to end, for a long prompt and for one inside a + n."""
    from vllm import SamplingParams

    for prompt, hit in ((tiny_text(0, 300), 288), (tiny_text(9000, 50), 32)):
        for salt, want in (("a", 0), ("b", 0), ("a", hit), ("b", hit)):
            asked = {"prompt_token_ids": prompt, "cache_salt": salt}
            (output,) = made.llm.generate([asked], SamplingParams(max_tokens=1))
            assert output.num_cached_tokens == want


def test_several_samples_and_aborted_requests(made: Engine) -> None:
    """Proves n > 1 and aborts with caching on: the answers are those of an empty cache."""
    from vllm import SamplingParams

    prompt = tiny_text(2000, 310)
    (first,) = made.generate([prompt], 30)
    best = SamplingParams(n=3, top_k=1, max_tokens=30, ignore_eos=True)
    (output,) = made.llm.generate([{"prompt_token_ids": prompt}], best)
    assert output.num_cached_tokens >= 288
    assert [list(c.token_ids) for c in output.outputs] == [first.token_ids] * 3
    for steps in (1, 2, 5):
        assert made.llm.reset_prefix_cache()
        assert made.generate([prompt, tiny_text(3000, 200)], 30, max_steps=steps) == []
        assert made.num_free_blocks == made.num_blocks
        (again,) = made.generate([prompt], 30)
        assert again.num_cached_tokens > 0
        assert_same([again], [first])
