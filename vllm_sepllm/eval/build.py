"""The tasks of a suite, from its files and a tokenizer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_sepllm.eval import cloze, suite_file
from vllm_sepllm.eval.needle import Needles, needles
from vllm_sepllm.eval.obey import obedience
from vllm_sepllm.eval.questions import Question, Scored, encode
from vllm_sepllm.eval.suite_file import Suite
from vllm_sepllm.eval.task import Task
from vllm_sepllm.eval.text import Texts, excerpts

_QA = ("context", "question", "answer")
# keys of a task's description that change which items are asked, but no answer
_OF_NO_EFFECT = {"questions", "round"}


def build(
    suite: Suite, data: Path, tokenizer: Any, limit: int | None = None
) -> list[tuple[Task, dict[str, Any]]]:
    """Each task with what its answers depend on.

    Args:
        suite: what to build.
        data: folder of its files.
        tokenizer: the model's.
        limit: items that are asked of each task; None: as many as the suite says.

    Raises:
        ValueError: if a file is missing or not what its task takes, or lm_eval is wanted and not
            installed.
    """
    found = []
    for spec in suite.tasks:
        files = [spec.file] if hasattr(spec, "file") else spec.files
        described = spec.model_dump(mode="json", exclude=_OF_NO_EFFECT)
        described["sha256"] = [sha256(_read(data / file)).hexdigest() for file in files]
        for task in _tasks(spec, data, tokenizer):
            asked = task if limit is None else replace(task, num_asked=limit)
            found.append((asked, described))
    return found


def _tasks(spec: suite_file.TaskSpec, data: Path, tokenizer: Any) -> list[Task]:
    match spec:
        case suite_file.TextSpec():
            return _texts(spec, _texts_of(data, spec.files), tokenizer)
        case suite_file.NeedleSpec():
            return _needles(spec, _texts_of(data, spec.files), tokenizer)
        case suite_file.ObeySpec():
            return _obedience(spec, _texts_of(data, spec.files), tokenizer)
        case suite_file.ClozeSpec():
            return [_cloze(spec, _texts_of(data, spec.files), tokenizer)]
        case suite_file.QaSpec():
            return [_qa(spec, data / spec.file, tokenizer)]
        case suite_file.HarnessSpec():
            return [_harness(spec, data / spec.file, tokenizer)]


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; see --data") from None
    if not content:
        raise ValueError(f"{path} is empty")
    return content


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _texts_of(data: Path, files: Sequence[str]) -> dict[str, str]:
    """Texts by the names that their items get."""
    texts: dict[str, str] = {}
    for file in files:
        name = Path(file).stem
        if name in texts:
            raise ValueError(
                f"{file} is the second file of the name {name!r}, by which answers are kept; "
                "rename one of the two"
            )
        texts[name] = _text(data / file)
    return texts


def _texts(spec: suite_file.TextSpec, texts: Mapping[str, str], tokenizer: Any) -> list[Task]:
    prefix = list(tokenizer("")["input_ids"])
    ids = {name: tokenizer(t, add_special_tokens=False)["input_ids"] for name, t in texts.items()}
    numbers = {"num_excerpts": spec.excerpts, "num_positions": spec.positions}
    tasks: list[Task] = []
    for length in dict.fromkeys(spec.context):
        items = [
            item
            for name, own in ids.items()
            for item in excerpts(name, own, prefix, length=length, **numbers)
        ]
        tasks.append(Texts(f"{spec.name}-{length}", length, tuple(items), None, spec.round))
    return tasks


def _needles(spec: suite_file.NeedleSpec, texts: Mapping[str, str], tokenizer: Any) -> list[Task]:
    depths, tasks = list(dict.fromkeys(spec.depths)), list[Task]()
    for length in dict.fromkeys(spec.context):
        items = needles(
            tokenizer,
            list(texts.values()),
            length=length,
            depths=depths,
            num_repeats=spec.needles,
        )
        tasks.append(Needles(f"{spec.name}-{length}", length, tuple(items), None, spec.round))
    return tasks


def _obedience(spec: suite_file.ObeySpec, texts: Mapping[str, str], tokenizer: Any) -> list[Task]:
    return [
        obedience(
            tokenizer,
            list(texts.values()),
            name=f"{spec.name}-{instruction}-{length}",
            instruction=instruction,
            length=length,
            num_items=spec.items,
            num_a_round=spec.round,
        )
        for length in dict.fromkeys(spec.context)
        for instruction in dict.fromkeys(spec.instructions)
    ]


def _scored(
    spec: suite_file.ClozeSpec | suite_file.QaSpec,
    pairs: Sequence[tuple[str, str]],
    num_asked: int | None,
    tokenizer: Any,
) -> Task:
    """Prompts and their known answers, with a blank between the two."""
    items = []
    for number, (prompt, answer) in enumerate(pairs):
        ids, known = encode(tokenizer, prompt, f" {answer}")
        items.append(Question(str(number), ids, known))
    length = max(len(item.prompt) + len(item.answer) for item in items) + 1
    return Scored(spec.name, length, tuple(items), num_asked, spec.round)


def _cloze(spec: suite_file.ClozeSpec, texts: Mapping[str, str], tokenizer: Any) -> Task:
    pairs = [
        pair
        for text in texts.values()
        for pair in cloze.questions(text, spec.words, spec.passages, spec.distance)
    ]
    if not pairs:
        raise ValueError(
            f"task {spec.name}: no passage of {spec.words} words breaks off before a name that it "
            "has told; give other texts"
        )
    return _scored(spec, pairs, None, tokenizer)


def _qa(spec: suite_file.QaSpec, path: Path, tokenizer: Any) -> Task:
    pairs = []
    for place, line in _lines(path):
        wrong = [key for key in _QA if not isinstance(line.get(key), str)]
        if wrong:
            raise ValueError(
                f"{place} must be an object with texts for {', '.join(_QA)}; it has none for "
                f"{', '.join(wrong)}"
            )
        question = f"\n\nQuestion: {line['question']}\nAnswer:" if line["question"] else ""
        pairs.append((f"{line['context']}{question}", line["answer"]))
    return _scored(spec, pairs, spec.questions, tokenizer)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Objects of a file of JSON lines, each with its place."""
    found = []
    # as JSON Lines are parted: a text may hold the other characters that splitlines() parts at
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be a JSON object, got {line[:40]}")
        found.append((place, value))
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


def _harness(spec: suite_file.HarnessSpec, path: Path, tokenizer: Any) -> Task:
    _lines(path)  # its errors name the line, those of lm_eval do not
    try:
        from vllm_sepllm.eval import harness
    except ImportError as error:
        raise ValueError(
            f"tasks of lm_eval need it ({error}); pip install 'vllm-sepllm[eval]'"
        ) from None
    config = {} if spec.task is None else harness.read_config(spec.task)
    return harness.make_task(
        spec.name,
        config | spec.config,
        path,
        tokenizer,
        solution=spec.solution,
        num_asked=spec.questions,
        num_a_round=spec.round,
    )
