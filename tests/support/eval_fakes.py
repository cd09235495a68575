"""An engine that knows nothing, and tasks of a few tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from vllm_sepllm.eval.engine import Scores
from vllm_sepllm.eval.methods import ModelFacts
from vllm_sepllm.eval.needle import Needle, Needles
from vllm_sepllm.eval.questions import Generated, Question
from vllm_sepllm.eval.text import Excerpt, Texts
from vllm_sepllm.policy.separators.definition import TokenSeparators

FACTS = ModelFacts(
    lambda spec: TokenSeparators(() if spec == () else (0,)),
    end_id=int,
    num_layers=4,
    max_model_len=200,
)
SEPLLM = {"window": 20}
BOOKS = Texts(
    "text-200",
    200,
    tuple(Excerpt(f"book-{i}", 200, tuple(j % 9 for j in range(199)), 4) for i in range(2)),
)
NEEDLES = Needles(
    "needle-150",
    150,
    tuple(Needle(f"{d}-0", 150, d, tuple(j % 9 for j in range(120)), "123") for d in (0.0, 0.5)),
)


def questions(num: int, **given: Any) -> Generated:
    """Questions of 100 tokens, right if the answer is said first or somewhere."""

    def grade(text: str) -> dict[str, bool]:
        return {"strict": text.startswith("123"), "flexible": "123" in text}

    prompts = [(*(j % 9 for j in range(99)), i) for i in range(num)]
    items = tuple(Question(str(i), prompt, (1, 2), grade) for i, prompt in enumerate(prompts))
    return Generated("gsm8k", 150, items, sampling={"max_tokens": 40, "stop": ["Q:"]}, **given)


class Entry(NamedTuple):
    """What vLLM says of a token of a prompt."""

    logprob: float
    rank: int


class FakeEngine:
    """Every token has probability one half; with sepllm's window alone the numbers are found."""

    def __init__(self, settings: Any, stops_after: int | None = None) -> None:
        self.settings = settings
        self.stops_after = stops_after

    def score(self, token_ids: Any, positions: Any) -> Scores:
        rows = torch.full((len(positions), 2), 0.5).log()
        num = len(token_ids) - 1
        top = 1 if self.settings == SEPLLM else 0
        return Scores([-0.6931471805599453] * num, [top] * num, rows)

    def generate(self, prompts: Any, **_sampling: Any) -> Iterator[tuple[int, Any]]:
        """Answers of three tokens, the last prompt first."""
        text = "it is 123" if self.settings == SEPLLM else "I do not know"
        for done, number in enumerate(reversed(range(len(prompts)))):
            if done == self.stops_after:
                raise KeyboardInterrupt
            answer = SimpleNamespace(text=text, token_ids=[1, 2, 3])
            entries = [None, *({i: Entry(-0.5, 1)} for i in prompts[number][1:])]
            yield number, SimpleNamespace(outputs=[answer], prompt_logprobs=entries)


class Start:
    """Starts fake engines and remembers settings and arguments of each."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, dict[str, Any]]] = []
        self.stops_after: int | None = None

    @contextmanager
    def __call__(self, _model: str, settings: Any, **arguments: Any) -> Iterator[FakeEngine]:
        self.started.append((settings, arguments))
        yield FakeEngine(settings, self.stops_after)


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.num_rounds = 0

    def starting(self, method: str) -> None:
        self.answers.append(f"start {method}")

    def answered(self, row: Any) -> None:
        self.answers.append(row.key)

    def finished_round(self) -> None:
        self.num_rounds += 1
