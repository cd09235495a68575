"""A suite file: which tasks are asked of which methods, in YAML.

For example::

    tasks:
      - kind: text
        files: [book.txt]
        context: [2048, 4096]
    methods:
      full: null
      sepllm: {}
      streaming-llm: {preset: streaming-llm, mean_kv_of: sepllm}
    engine: {dtype: float32}

A method is what ``additional_config["sepllm"]`` holds, null for stock vLLM; ``mean_kv_of`` names
the method whose mean KV it gets, by the choice of its window. Files are names below ``--data``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, MIN_WINDOW, SepLLMConfig
from vllm_sepllm.eval.methods import DEFAULTS, FIXED, FULL, Method

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MEAN_KV_OF = "mean_kv_of"
# fields of EngineArgs that would change what is measured without a word
_CHOSEN = {
    "model": "name it as MODEL",
    "attention_backend": "each method has its own",
    "attention_config": "each method has its own",
    "additional_config": "settings go into methods",
    "max_model_len": "it is the longest context of the run",
}

Context = Annotated[int, Field(ge=16)]
Positive = Annotated[int, Field(ge=1)]


class _Spec(BaseModel):
    """What all tasks have.

    Attributes:
        name: in the store and the report; default the kind.
        round: items that all methods answer before the next ones begin; default all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str
    name: str = ""
    round: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if isinstance(given, dict) and "kind" in given and not given.get("name"):
            return {**given, "name": str(given["kind"])}
        return given


class TextSpec(_Spec):
    """Perplexity and KL divergence over excerpts of long texts (eval/text.py).

    Attributes:
        context: tokens of an excerpt, one task each.
        excerpts: of each text and context.
        positions: compared by KL in each excerpt.
    """

    kind: Literal["text"]
    files: list[str] = Field(min_length=1)
    context: list[Context] = Field(min_length=1)
    excerpts: Positive = 1
    positions: Annotated[int, Field(ge=2)] = 128


class NeedleSpec(_Spec):
    """A number hidden in a text (eval/needle.py).

    Attributes:
        context: tokens of prompt and answer, one task each.
        depths: where the needle is, 0 the start of the text, 1 its end.
        needles: of each depth and context.
    """

    kind: Literal["needle"]
    files: list[str] = Field(min_length=1)
    context: list[Context] = Field(min_length=1)
    depths: list[Annotated[float, Field(ge=0, le=1)]] = [0.0, 0.25, 0.5, 0.75, 1.0]
    needles: Positive = 2


class ObeySpec(_Spec):
    """Instructions in a system prompt before a long conversation (eval/obey.py).

    Attributes:
        context: tokens of system prompt, conversation and answer, one task each.
        instructions: "word", "tool" or both, one task each.
        items: of each context and instruction.
    """

    kind: Literal["obey"]
    files: list[str] = Field(min_length=1)
    context: list[Context] = Field(min_length=1)
    instructions: list[Literal["word", "tool"]] = Field(["word", "tool"], min_length=1)
    items: Positive = 20


class ClozeSpec(_Spec):
    """Passages that break off before a name (eval/cloze.py).

    Attributes:
        words: of a passage.
        passages: of each file.
        distance: words since the passage told the name, at least.
    """

    kind: Literal["cloze"]
    files: list[str] = Field(min_length=1)
    words: Positive = 700
    passages: Positive = 12
    distance: Positive = 1


class QaSpec(_Spec):
    """Known answers to questions about passages, scored.

    Attributes:
        file: JSON lines of {"context", "question", "answer"}; a question "" goes on with the
            context.
        questions: how many, from the first; default all.
    """

    kind: Literal["qa"]
    file: str
    questions: Positive | None = None


class HarnessSpec(_Spec):
    """A task of lm_eval on a local file (eval/harness.py).

    Attributes:
        file: JSON lines, one a question.
        task: path below lm_eval's tasks, such as "gsm8k/gsm8k-cot.yaml".
        config: lm_eval's description of a task, beside or instead of ``task``.
        solution: field of a line with a text like the answers that will be generated.
        questions: how many, from the first; default all.
    """

    kind: Literal["lm_eval"]
    file: str
    task: str | None = None
    config: dict[str, Any] = {}
    solution: str | None = None
    questions: Positive | None = None


TaskSpec = TextSpec | NeedleSpec | ObeySpec | ClozeSpec | QaSpec | HarnessSpec


class Suite(BaseModel):
    """What a run measures.

    Attributes:
        tasks: at least one, each name once.
        methods: by name; full attention comes first, whether named or not.
        engine: vLLM's EngineArgs, the same for all methods.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tasks: list[Annotated[TaskSpec, Field(discriminator="kind")]] = Field(min_length=1)
    methods: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "Suite":
        names = [task.name for task in self.tasks]
        for name in [*names, *self.methods]:
            if not _NAME.fullmatch(name):
                raise ValueError(f"a name is of letters, digits, dots, hyphens and _, got {name!r}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks need names of their own, got {twice} twice")
        taken = sorted(_CHOSEN.keys() & self.engine.keys())
        if taken:
            raise ValueError(
                "; ".join(f"engine must not hold {key}: {_CHOSEN[key]}" for key in taken)
            )
        if FULL in self.methods and self.methods[FULL] is not None:
            raise ValueError("full is stock vLLM: write full: null")
        for name, settings in self.methods.items():
            _check_method(name, settings, self.methods)
        return self

    @property
    def compared(self) -> list[Method]:
        """The methods, full attention first."""
        if not self.methods:
            return list(DEFAULTS)
        found = [Method(FULL, None)]
        for name, settings in self.methods.items():
            if settings is not None:
                own = {key: value for key, value in settings.items() if key != _MEAN_KV_OF}
                found.append(Method(name, own, settings.get(_MEAN_KV_OF)))
        return found


def _check_method(
    name: str, settings: Mapping[str, Any] | None, methods: Mapping[str, Any]
) -> None:
    """Refuse settings that no engine would take, and a mean KV that is not fixed."""
    if settings is None:
        if name != FULL:
            raise ValueError(f"method {name} has no settings; write {name}: {{}} for the defaults")
        return
    own = {key: value for key, value in settings.items() if key != _MEAN_KV_OF}
    if _MEAN_KV_OF in settings:
        other = settings[_MEAN_KV_OF]
        if not methods.get(other) and methods.get(other) != {}:
            raise ValueError(f"method {name}: {_MEAN_KV_OF} must name another method, got {other}")
        if _MEAN_KV_OF in methods[other]:
            raise ValueError(f"method {name}: the window of {other} is chosen itself")
        if "window" in own:
            raise ValueError(f"method {name}: {_MEAN_KV_OF} chooses the window, leave it out")
        # what is chosen later
        own = {"window": MIN_WINDOW, **own}
        if own.get("preset") == FIXED:
            own = {"interval": 2, **own}
    try:
        SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: own})
    except ValueError as error:
        raise ValueError(f"method {name}: {error}") from None


def read_suite(path: Path) -> Suite:
    """The suite that a file describes.

    Raises:
        ValueError: naming what is wrong in it.
    """
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    try:
        return Suite.model_validate(given)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"])
            cause = item.get("ctx", {}).get("error")
            said = str(cause) if isinstance(cause, ValueError) else item["msg"]
            problems.append(f"{place}: {said}" if place else said)
        raise ValueError(f"{path}: " + "; ".join(problems)) from None
