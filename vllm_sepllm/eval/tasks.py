"""GSM8K and questions about a passage through lm_eval, on local files; the extra ``eval``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from vllm_sepllm.eval.engine import Engine
from vllm_sepllm.eval.methods import Span
from vllm_sepllm.eval.store import Store

MAX_ANSWER_TOKENS = 256
_NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
_LAST_NUMBER = {"function": "regex", "regex_pattern": _NUMBER, "group_select": -1}
_FIRST_LINE = {"function": "regex", "regex_pattern": r"\s*(.+)"}


def gsm8k(path: Path) -> dict[str, Any]:
    """GSM8K's own file, eight of its other questions as examples; the last number is the answer."""
    return _config("gsm8k", path, "Q: {{question}}\nA:", _LAST_NUMBER, "Q:", 8) | {
        "doc_to_target": "{{answer}}"
    }


def passages(path: Path) -> dict[str, Any]:
    """Lines of {"context", "question", "answer"}; the answer's first line must be the answer."""
    text = "{{context}}\n\nQuestion: {{question}}\nAnswer:"
    return _config("qa", path, text, _FIRST_LINE, "\n\n", 0) | {"doc_to_target": "{{answer}}"}


def _config(
    name: str, path: Path, text: str, answer: dict[str, Any], stop: str, num_fewshot: int
) -> dict[str, Any]:
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    # of the file's answers all but the number behind ####; money and thousands as plain numbers
    exact |= {"ignore_case": True, "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": num_fewshot,
        "output_type": "generate_until",
        "doc_to_text": text,
        "generation_kwargs": {
            "until": [stop],
            "do_sample": False,
            "max_gen_toks": MAX_ANSWER_TOKENS,
        },
        "filter_list": [{"name": "answer", "filter": [answer, {"function": "take_first"}]}],
        "metric_list": [exact],
    }


class _Model(LM):  # type: ignore[misc]  # lm_eval has no types
    """lm_eval's view of an engine; without one it answers nothing and keeps the prompts."""

    def __init__(self, tokenizer: Any, engine: Engine | None) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._engine = engine
        self.prompts: list[list[int]] = []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts = [list(self._tokenizer(r.args[0])["input_ids"]) for r in requests]
        if self._engine is None:
            return [""] * len(requests)
        options = requests[0].args[1]
        return self._engine.answer(self.prompts, options["max_gen_toks"], tuple(options["until"]))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("the tasks of this file generate")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError("the tasks of this file generate")


@dataclass(frozen=True, slots=True)
class Task:
    """One of the tasks above over its first questions.

    Attributes:
        name: of the task.
        length: context that the longest prompt and its answer need.
        config: lm_eval's.
        limit: questions.
        tokenizer: the model's.
        prompts: token ids of all of them.
    """

    name: str
    length: int
    config: dict[str, Any]
    limit: int
    tokenizer: Any
    prompts: tuple[tuple[int, ...], ...]

    suite = "task"

    @property
    def spans(self) -> list[Span]:
        """The last query of each prompt."""
        return [Span(prompt, len(prompt) - 1) for prompt in self.prompts]

    def run(self, engine: Engine, _method: str, _store: Store) -> dict[str, Any]:
        """Which questions were answered rightly."""
        found = _evaluate(_Model(self.tokenizer, engine), self.config, self.limit)
        samples = sorted(found["samples"][self.name], key=lambda sample: sample["doc_id"])
        return {"is_right": [bool(sample["exact_match"]) for sample in samples]}


def make_task(config: dict[str, Any], limit: int, tokenizer: Any) -> Task:
    """A task and its prompts."""
    model = _Model(tokenizer, None)
    _evaluate(model, config, limit)
    prompts: Sequence[tuple[int, ...]] = [tuple(prompt) for prompt in model.prompts]
    length = max(map(len, prompts)) + MAX_ANSWER_TOKENS
    return Task(config["task"], length, config, limit, tokenizer, tuple(prompts))


def _evaluate(model: _Model, config: dict[str, Any], limit: int) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=[dict(config)], limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return found
