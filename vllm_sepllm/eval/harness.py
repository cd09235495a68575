"""Tasks of lm_eval (the extra ``eval``) on local files: its prompts, stop strings and grades.

lm_eval writes the prompts and reads the answers; the engine of the run answers them, so that
methods share an engine, and every answer is stored as soon as it is there.
"""

from collections.abc import Mapping
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from vllm_sepllm.eval.questions import Generated, Question, Scored, encode
from vllm_sepllm.eval.task import Task

# lm_eval's own, for tasks that name none
_MAX_ANSWER_TOKENS = 256
_FEWSHOT_SEED = 1234
_GENERATED, _SCORED = "generate_until", "loglikelihood"
_METRIC = "exact_match"  # of generated answers


def read_config(name: str) -> dict[str, Any]:
    """The description of a task that ships with lm_eval.

    Args:
        name: path below lm_eval's tasks, such as ``gsm8k/gsm8k-cot.yaml``.

    Raises:
        ValueError: if there is no such file.
    """
    path = Path(lm_eval.tasks.__file__).parent / name
    if not path.is_file():
        raise ValueError(f"lm_eval has no task file {name}; wanted such as gsm8k/gsm8k-cot.yaml")
    found: dict[str, Any] = load_yaml(path)
    return found


def make_task(
    name: str,
    config: Mapping[str, Any],
    file: Path,
    tokenizer: Any,
    *,
    solution: str | None,
    num_asked: int | None,
    num_a_round: int | None,
) -> Task:
    """A task of the suite.

    Args:
        name: in the store and the report.
        config: lm_eval's, whose data are replaced.
        file: JSON lines, one a question.
        tokenizer: the model's.
        solution: field of a line with a text like the answers that are generated; windows are
            chosen on it. None: on the prompt.
        num_asked: see Task.
        num_a_round: see Task.

    Raises:
        ValueError: if lm_eval cannot make questions of the file, or the task is of another kind.
    """
    kind = config.get("output_type", _GENERATED)
    if kind not in (_GENERATED, _SCORED):
        raise ValueError(
            f"task {name}: output_type must be {_GENERATED} or {_SCORED}, got {kind!r}"
        )
    if kind == _GENERATED and [m.get("metric") for m in config.get("metric_list", ())] != [_METRIC]:
        raise ValueError(f"task {name}: the only metric of generated answers is {_METRIC}")
    given = {
        **{key: value for key, value in config.items() if key not in ("dataset_name", "tag")},
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
    }
    try:
        # hides its progress bars; what goes wrong is raised
        with redirect_stderr(StringIO()):
            task = _load(given)
    except Exception as error:
        raise ValueError(f"lm_eval makes no task of {file}: {error}") from error
    if kind == _SCORED:
        items = tuple(_scored(tokenizer, instance) for instance in task.instances)
        length = max(len(item.prompt) + len(item.answer) for item in items) + 1
        return Scored(name, length, items, num_asked, num_a_round)
    items = tuple(_generated(tokenizer, task, instance, solution) for instance in task.instances)
    sampling = _sampling(task.instances[0].args[1])
    length = max(len(item.prompt) for item in items) + sampling["max_tokens"] + 1
    return Generated(name, length, items, num_asked, num_a_round, sampling)


def _load(config: Mapping[str, Any]) -> Any:
    """lm_eval's task with the prompts of all questions."""
    (task,) = TaskManager(include_defaults=False).load_task_or_group([config]).values()
    task.set_fewshot_seed(_FEWSHOT_SEED)
    task.build_all_requests(rank=0, world_size=1)
    return task


def _scored(tokenizer: Any, instance: Any) -> Question:
    prompt, answer = encode(tokenizer, *instance.args)
    return Question(str(instance.doc_id), prompt, answer)


def _generated(tokenizer: Any, task: Any, instance: Any, solution: str | None) -> Question:
    text, doc = instance.args[0], instance.doc
    # without its own solution a question stands for the first token of its answer
    known = f" {doc[solution]}" if solution is not None else " "
    prompt = tuple(tokenizer(text)["input_ids"])
    answer = tuple(tokenizer(text + known)["input_ids"])[len(prompt) :] or (prompt[-1],)
    return Question(str(instance.doc_id), prompt, answer, partial(_grade, task, instance))


def _grade(task: Any, instance: Any, text: str) -> dict[str, bool]:
    """Whether an answer is right, by each of the task's filters."""
    instance.resps = [text]
    for steps in task._filters:
        steps.apply([instance])
    right = {}
    for name, filtered in instance.filtered_resps.items():
        right[name] = bool(task.process_results(instance.doc, [filtered])[_METRIC])
    return right


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Where an answer ends; greedy, whatever the task says."""
    until = given.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    return {"max_tokens": int(given.get("max_gen_toks", _MAX_ANSWER_TOKENS)), "stop": stop}
