"""Needles: a sentence with a number, somewhere in a long text, and a question for the number."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_sepllm.eval.engine import Engine
from vllm_sepllm.eval.methods import Span
from vllm_sepllm.eval.prompts import chat_ids, filled
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.task import Task

MAX_ANSWER_TOKENS = 24
# one more character of the text also moves the needle
_SLACK = 8
_CITIES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Perth", "Oslo", "Lima", "Cairo")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_TASK = "Read the text. A secret number is hidden in it."


@dataclass(frozen=True, slots=True)
class Needle:
    """One request.

    Attributes:
        name: of the depth and the repetition.
        length: context that prompt and answer fill.
        depth: where the needle is, 0 the start of the text, 1 its end.
        token_ids: the prompt, at most length - MAX_ANSWER_TOKENS.
        answer: the number.
    """

    name: str
    length: int
    depth: float
    token_ids: tuple[int, ...]
    answer: str

    @property
    def span(self) -> Span:
        """The last query of the prompt, which must find the needle."""
        return Span(self.token_ids, len(self.token_ids) - 1)


class Needles(Task):
    """Needles of one context length."""

    kind = "needle"

    def run(
        self, engine: Engine, items: Sequence[Needle], _row: str, _store: Store
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ask, and look for the numbers in the answers."""
        prompts = [item.token_ids for item in items]
        for number, output in engine.generate(prompts, max_tokens=MAX_ANSWER_TOKENS):
            item, text = items[number], output.outputs[0].text
            digits = re.sub(r"(?<=\d)[ ,](?=\d)", "", text)
            yield (
                item.name,
                {"depth": item.depth, "is_found": item.answer in digits, "text": text},
            )


def needles(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int,
    depths: Sequence[float],
    num_repeats: int,
) -> list[Needle]:
    """Needles of one context length; the same for the same arguments.

    Args:
        tokenizer: the model's, asked in its chat template if it has one.
        texts: what the needle is hidden in; another excerpt each time.
        length: context.
        depths: in [0, 1].
        num_repeats: needles per depth.

    Raises:
        ValueError: if a text does not fill the context, or the context does not hold the question.
    """
    found: list[Needle] = []
    for repeat in range(num_repeats):
        for depth in depths:
            chance = random.Random(f"{length} {depth} {repeat}")
            text = texts[len(found) % len(texts)]
            city, number = chance.choice(_CITIES), str(chance.randrange(1000000, 9999999))
            start = chance.randrange(len(text) // 10, max(1, len(text) // 2))
            prompt = partial(_prompt, tokenizer, city=city, number=number, depth=depth)
            ids = filled(prompt, text[start:], length, MAX_ANSWER_TOKENS, _SLACK)
            found.append(Needle(f"{depth:g}-{repeat}", length, depth, ids, number))
    return found


def _prompt(tokenizer: Any, text: str, city: str, number: str, depth: float) -> list[int]:
    """Token ids of the question behind the text with the needle in it."""
    fact = f"The secret number of {city} is {number}."
    question = f"What is the secret number of {city}?"
    body = f"{_TASK}\n\n{hide(text, fact, depth)}\n\n{question} Answer with the number."
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{body}\nThe secret number of {city} is")["input_ids"])
    return chat_ids(tokenizer, [{"role": "user", "content": body}])


def hide(text: str, fact: str, depth: float) -> str:
    """``text`` with ``fact`` at the end of the sentence that is nearest to ``depth``."""
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    at = min(ends, key=lambda end: abs(end - depth * len(text)))
    return f"{text[:at]}{fact} {text[at:]}"
