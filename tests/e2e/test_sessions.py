"""Streaming input, AsyncLLM's sessions of several turns, in a real engine."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import one_collection
from tests.support.oracle import Rule, epochs_of, greedy
from tests.support.tiny_engine import tiny_sepllm
from tests.support.tiny_models import SEPARATORS, tiny_text

pytestmark = pytest.mark.slow

WINDOW, BLOCK = 60, 32
RULE = Rule(initial_tokens=4, window=WINDOW, separator_ids=frozenset(SEPARATORS))
# tokens that a turn samples: all but the last stay in the session
NUM_SAMPLED = (1, 5)


@contextmanager
def async_engine(model: Path, max_model_len: int, **policy: Any) -> Iterator[Any]:
    """An engine of the tiny model that takes sessions."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(model),
        **tiny_sepllm(window=WINDOW, **policy),
        dtype="float32",
        enforce_eager=True,
        max_model_len=max_model_len,
        max_num_batched_tokens=128,
        disable_log_stats=True,
    )
    with one_collection():
        made = AsyncLLM.from_engine_args(arguments)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture(scope="module")
def engine(tiny_llama_path: Path) -> Iterator[Any]:
    with async_engine(tiny_llama_path, 1024) as made:
        yield made


async def turns(engine: Any, name: str, news: list[list[int]], num_sampled: int) -> list[list[int]]:
    """Answers of the turns of one session; each turn waits for the answer before."""
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    answers: list[list[int]] = [[]]
    is_answered = asyncio.Event()
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=num_sampled,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )

    async def asked() -> AsyncGenerator[StreamingInput, None]:
        for tokens in news:
            # vLLM extends the list
            yield StreamingInput({"type": "token", "prompt_token_ids": list(tokens)})
            await is_answered.wait()
            is_answered.clear()

    async for output in engine.generate(asked(), sampling, name):
        answers[-1] += output.outputs[0].token_ids
        if len(answers[-1]) == num_sampled:
            answers.append([])
            is_answered.set()
    return answers[: len(news)]


@pytest.mark.compatibility("Streaming input (sessions of several turns)", "exact")
def test_turns_at_edges_equal_plain_requests(engine: Any, tiny_llama_path: Path) -> None:
    """Proves it where turns end beside the window's and a block's edge, also without any output."""
    text = tiny_text(0, 1000)
    lengths = [edge + i for edge in (4 + WINDOW, 3 * BLOCK, 300) for i in (-1, 0, 1)]
    sessions = [[text[:n], text[n : n + 40], text[500:630]] for n in lengths]

    async def ask() -> list[list[list[list[int]]]]:
        return [
            await asyncio.gather(
                *(turns(engine, f"{n}-{i}", news, n) for i, news in enumerate(sessions))
            )
            for n in NUM_SAMPLED
        ]

    for found in asyncio.run(ask()):
        for news, answers in zip(sessions, found, strict=True):
            whole: list[int] = []
            for tokens, answer in zip(news, answers, strict=True):
                whole += tokens
                assert answer == greedy(tiny_llama_path, whole, answer, RULE)
                whole += answer[:-1]


@pytest.mark.compatibility("Sessions beyond the trained length", "exact")
def test_a_session_crosses_epochs(tiny_llama_path: Path) -> None:
    """Proves it for turns that end beside a boundary, in mid-epoch, and cross one in an answer."""

    rule = replace(RULE, max_separators=32, max_position=300)
    text = tiny_text(0, 1200)
    starts = [epoch.first for epoch in epochs_of(text, rule)]
    edges = [starts[1] - 1, starts[2], starts[3] + 1, starts[3] + 100]
    news = [text[first:last] for first, last in pairwise([0, *edges])]
    policy = {"max_separators": 32, "positions": "renumbered", "max_position": 300}
    with async_engine(tiny_llama_path, 100_000, **policy) as engine:
        answers = asyncio.run(turns(engine, "endless", news, 60))
    whole: list[int] = []
    for tokens, answer in zip(news, answers, strict=True):
        whole += tokens
        assert answer == greedy(tiny_llama_path, whole, answer, rule)
        whole += answer[:-1]
    assert len(epochs_of(whole, rule)) > 4
