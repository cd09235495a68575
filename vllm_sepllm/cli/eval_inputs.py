"""What ``vllm-sepllm eval`` reads: texts and questions, checked, and the items made of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import typer

from vllm_sepllm.cli import options

_GSM8K = ("question", "answer")
_QA = ("context", "question", "answer")


def read_texts(paths: Iterable[Path]) -> dict[str, str]:
    """Texts by the names that their cells get.

    Raises:
        typer.BadParameter: for a file that is no text, and for two of the same name.
    """
    texts: dict[str, str] = {}
    for path in paths:
        if path.stem in texts:
            raise typer.BadParameter(
                f"--text {path} is the second one of the name {path.stem!r}, by which cells are "
                "kept; rename one of the two"
            )
        texts[path.stem] = options.read_text(path)
    return texts


def identity(path: Path | None) -> dict[str, str] | None:
    """What tells a file that was read from another one, also of the same name."""
    if path is None:
        return None
    return {"file": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


def text_items(tokenizer: Any, texts: Mapping[str, str], sizes: Mapping[str, Any]) -> list[Any]:
    """Excerpts and needles.

    Raises:
        typer.BadParameter: if a text is too short for them.
    """
    from vllm_sepllm.eval.needle import needles
    from vllm_sepllm.eval.text import excerpts

    prefix = list(tokenizer("")["input_ids"])
    numbers = {"num_excerpts": sizes["excerpts"], "num_positions": sizes["positions"]}
    items: list[Any] = []
    try:
        for name, text in texts.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for length in sizes["context"]:
                items += excerpts(name, ids, prefix, length=length, **numbers)
        for length in sizes["needle_context"] if texts and sizes["needles"] else ():
            items += needles(
                tokenizer,
                list(texts.values()),
                length=length,
                depths=sizes["depth"],
                num_repeats=sizes["needles"],
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return items


def task_items(tokenizer: Any, gsm8k: Path | None, qa: Path | None, limit: int) -> list[Any]:
    """Tasks over the first ``limit`` questions.

    Raises:
        typer.BadParameter: without lm_eval, and for a file that is not what its option takes.
    """
    if gsm8k is None and qa is None:
        return []
    num_gsm8k = _num_lines("--gsm8k", gsm8k, _GSM8K)
    _num_lines("--qa", qa, _QA)
    try:
        from vllm_sepllm.eval import tasks
    except ImportError as error:
        raise typer.BadParameter(
            f"--gsm8k and --qa need lm_eval ({error}); pip install 'vllm-sepllm[eval]'"
        ) from None
    if gsm8k is not None and num_gsm8k <= tasks.NUM_EXAMPLES:
        raise typer.BadParameter(
            f"--gsm8k {gsm8k} has {num_gsm8k} questions, but each is asked behind "
            f"{tasks.NUM_EXAMPLES} others; give a file of more"
        )
    configs = [] if gsm8k is None else [tasks.gsm8k(gsm8k), tasks.gsm8k_answers(gsm8k)]
    configs += [] if qa is None else [tasks.passages(qa)]
    return [tasks.make_task(config, limit, tokenizer) for config in configs]


def _num_lines(option: str, path: Path | None, keys: Sequence[str]) -> int:
    """How many questions a file holds, each a JSON object with texts for the keys."""
    if path is None:
        return 0
    # as JSON Lines are parted: a text may hold the other characters that splitlines() parts at
    lines = options.read_text(path).split("\n")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in filled:
        place = f"{option} {path}, line {number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise typer.BadParameter(f"{place} is not JSON: {error}") from None
        wrong = [
            key
            for key in keys
            if not isinstance(found, dict) or not isinstance(found.get(key), str)
        ]
        if wrong:
            raise typer.BadParameter(
                f"{place} must be an object with texts for {', '.join(keys)}; it has none for "
                f"{', '.join(wrong)}"
            )
    if not filled:
        raise typer.BadParameter(f"{option} {path} holds no question")
    return len(filled)
