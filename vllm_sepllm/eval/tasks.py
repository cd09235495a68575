"""GSM8K and questions about passages through lm_eval's vllm model, on local files.

Needs the extra ``eval``. A task that generates says which answers are right. One that scores asks
for the log-probability of the known answer behind its prompt, which tells methods apart where a
small model gets hardly an answer right.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from vllm_sepllm.eval.engine import llm_arguments
from vllm_sepllm.eval.methods import Span
from vllm_sepllm.eval.store import Store

MAX_ANSWER_TOKENS = 256
NUM_EXAMPLES = 8  # of GSM8K, from the same file
_SCORES = "loglikelihood"
_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_LAST_NUMBER = {"function": "regex", "regex_pattern": _NUMBER, "group_select": -1}


def gsm8k(path: Path) -> dict[str, Any]:
    """GSM8K's own file, eight of its other questions as examples; the last number is the answer."""
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    # of the file's answers all but the number behind ####; money and thousands as plain numbers
    exact |= {"ignore_case": True, "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]}
    return _gsm8k("gsm8k", path) | {
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": ["Q:"],
            "do_sample": False,
            "max_gen_toks": MAX_ANSWER_TOKENS,
        },
        "filter_list": [{"name": "answer", "filter": [_LAST_NUMBER, {"function": "take_first"}]}],
        "metric_list": [exact],
    }


def gsm8k_answers(path: Path) -> dict[str, Any]:
    """The same prompts; how probable the file's own solution is, reasoning and all."""
    return _gsm8k("gsm8k-answers", path) | _scored()


def passages(path: Path) -> dict[str, Any]:
    """Lines of {"context", "question", "answer"}: how probable the answer is behind the two.

    Right is an answer that greedy decoding would give. A question "" goes on with the context.
    """
    text = "{{context}}{% if question %}\n\nQuestion: {{question}}\nAnswer:{% endif %}"
    return _config("qa", path, text, 0) | _scored()


def _gsm8k(name: str, path: Path) -> dict[str, Any]:
    return _config(name, path, "Q: {{question}}\nA:", NUM_EXAMPLES)


def _scored() -> dict[str, Any]:
    return {
        "output_type": _SCORES,
        # lm_eval scores the target alone, and puts the delimiter into examples alone
        "doc_to_target": " {{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _config(name: str, path: Path, text: str, num_fewshot: int) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": num_fewshot,
        "doc_to_text": text,
        "doc_to_target": "{{answer}}",
    }


@contextmanager
def running(model: str, settings: Mapping[str, Any] | None, **arguments: Any) -> Iterator[LM]:
    """lm_eval's own vllm model, which starts the engine; its memory is given back afterwards."""
    given = llm_arguments(settings, arguments)
    from lm_eval.models.vllm_causallms import VLLM

    found = VLLM(pretrained=model, **given)
    try:
        yield found
    finally:
        del found.model
        gc.collect()


class _Prompts(LM):  # type: ignore[misc]  # lm_eval has no types
    """Answers nothing and keeps what it is asked, as token ids."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.spans: list[Span] = []

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text)["input_ids"])

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self._ids(request.args[0]) for request in requests]
        # the last query of each prompt
        self.spans = [Span(prompt, len(prompt) - 1) for prompt in prompts]
        return [""] * len(requests)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        # the queries that predict the answer: its last token predicts nothing that is scored
        self.spans = [
            Span(self._ids(prompt + answer)[:-1], len(self._ids(prompt)) - 1)
            for prompt, answer in (request.args for request in requests)
        ]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("the tasks of this file generate, or score one answer")


@dataclass(frozen=True, slots=True)
class Task:
    """One of the tasks above over its first questions.

    Attributes:
        name: of the task.
        length: context that the longest prompt and its answer need.
        config: lm_eval's.
        limit: questions.
        spans: its requests, and the queries whose KV is counted.
    """

    name: str
    length: int
    config: dict[str, Any]
    limit: int
    spans: list[Span]

    suite = "task"
    opened = staticmethod(running)

    def run(self, engine: LM, _method: str, _store: Store) -> dict[str, Any]:
        """Which questions were answered rightly; of scored answers nats per token too."""
        found = _evaluate(engine, self.config, self.limit)
        samples = sorted(found["samples"][self.name], key=lambda sample: sample["doc_id"])
        if self.config["output_type"] != _SCORES:
            return {"is_right": [bool(sample["exact_match"]) for sample in samples]}
        answers = [sample["filtered_resps"][0] for sample in samples]
        num_tokens = [len(span.token_ids) - span.first for span in self.spans]
        nll = [-logprob / num for (logprob, _), num in zip(answers, num_tokens, strict=True)]
        return {"is_right": [bool(is_greedy) for _, is_greedy in answers], "nll": nll}


def make_task(config: dict[str, Any], limit: int, tokenizer: Any) -> Task:
    """A task and its prompts."""
    prompts = _Prompts(tokenizer)
    _evaluate(prompts, config, limit)
    room = 1 if config["output_type"] == _SCORES else MAX_ANSWER_TOKENS
    length = max(len(span.token_ids) for span in prompts.spans) + room + 1
    return Task(config["task"], length, config, limit, prompts.spans)


def _evaluate(model: LM, config: dict[str, Any], limit: int) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=[dict(config)], limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return found
