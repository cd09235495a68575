"""Questions whose answers are generated, or whose known answers are scored.

Scoring asks for the log-probability of the known answer behind its prompt, which tells methods
apart where a small model gets hardly an answer right.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sepllm.eval.engine import Engine
from vllm_sepllm.eval.methods import Span
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.task import Task


@dataclass(frozen=True, slots=True)
class Question:
    """One request.

    Attributes:
        name: of the question in its file.
        prompt: token ids.
        answer: token ids of the known answer behind the prompt; of a generated one, about what the
            model will say.
        grade: of a generated answer: whether its text is right, by each way of reading it.
    """

    name: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    grade: Callable[[str], dict[str, bool]] | None = field(default=None, compare=False)

    @property
    def span(self) -> Span:
        """The queries that predict the answer: its last token predicts nothing that counts."""
        return answer_span(self.prompt, self.answer)


def answer_span(prompt: Sequence[int], answer: Sequence[int]) -> Span:
    """The queries that predict an answer of at least one token."""
    return Span((*prompt, *answer[:-1]), len(prompt) - 1)


class Scored(Task):
    """Known answers: nats per token, and right if greedy decoding would give the answer."""

    kind = "scored"

    def run(
        self, engine: Engine, items: Sequence[Question], _row: str, _store: Store
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Score the answers."""
        prompts = [(*item.prompt, *item.answer) for item in items]
        for number, output in engine.generate(prompts, max_tokens=1, prompt_logprobs=1):
            item, entries = items[number], output.prompt_logprobs
            assert entries is not None, "asked for"
            scored = list(zip(item.answer, entries[len(item.prompt) :], strict=True))
            logprobs = [entry[token_id].logprob for token_id, entry in scored if entry]
            is_right = all(entry[token_id].rank == 1 for token_id, entry in scored if entry)
            yield item.name, {"nll": -sum(logprobs) / len(logprobs), "right": {"greedy": is_right}}


@dataclass(frozen=True)
class Generated(Task):
    """Answers in the model's own words.

    Attributes:
        sampling: of ``vllm.SamplingParams``: where an answer ends.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)

    kind = "generated"

    def spans(self, items: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> list[Span]:
        """The queries that generated the answers."""
        pairs = zip(items, answers, strict=True)
        return [answer_span(item.prompt, answer["token_ids"]) for item, answer in pairs]

    def run(
        self, engine: Engine, items: Sequence[Question], _row: str, _store: Store
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Generate the answers; their token ids tell how much was kept."""
        prompts = [item.prompt for item in items]
        for number, output in engine.generate(prompts, **self.sampling):
            item, found = items[number], output.outputs[0]
            assert item.grade is not None, "a task that generates can tell what is right"
            answer = {"text": found.text, "token_ids": list(found.token_ids)}
            yield item.name, answer | {"right": item.grade(found.text)}


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt and of the answer behind it, tokenised as one text.

    White space at the end of the prompt goes to the answer, as tokenizers join it with words.
    """
    stripped = prompt.rstrip()
    ids = tuple(tokenizer(stripped)["input_ids"])
    both = tuple(tokenizer(prompt + answer)["input_ids"])
    return ids, both[len(ids) :]
