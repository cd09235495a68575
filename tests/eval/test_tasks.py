"""lm_eval's tasks on local files: prompts, what counts as right, one cell a method."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="an extra")

from vllm_sepllm.eval import tasks


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class FakeEngine:
    """Answers each question by what ``knows`` says."""

    def __init__(self, knows: dict[str, str]) -> None:
        self.knows = knows

    def answer(self, prompts: list[list[int]], _max_tokens: int, stop: tuple[str, ...]) -> Any:
        assert stop
        texts = ["".join(map(chr, prompt)) for prompt in prompts]
        last = [text.rpartition("Q")[2] for text in texts]
        return [next((a for q, a in self.knows.items() if q in text), "?") for text in last]


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        {"question": f"What is {i} hundred and 7?", "answer": f"It is so.\n#### {i},107"}
        for i in range(1, 13)
    ]
    task = tasks.make_task(tasks.gsm8k(write(tmp_path / "g.jsonl", lines)), 4, Characters())
    prompts = ["".join(map(chr, prompt)) for prompt in task.prompts]
    assert [p.count("Q: ") for p in prompts] == [9] * 4
    assert all(p.endswith("\nA:") for p in prompts)
    # no question is its own example
    assert all(p.count(p[p.rindex("Q: ") :]) == 1 for p in prompts)
    assert task.length == max(map(len, prompts)) + tasks.MAX_ANSWER_TOKENS
    assert task.spans[0].first == len(task.spans[0].token_ids) - 1
    engine: Any = FakeEngine(
        {"What is 1 ": "so 5, no: $1,107.", "What is 2 ": "7", "What is 4 ": "It is 4107"}
    )
    nothing: Any = None
    assert task.run(engine, "full", nothing) == {"is_right": [True, False, False, True]}


def test_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"context": f"{n} is at home.", "question": f"Is {n}?", "answer": n} for n in "ABC"]
    task = tasks.make_task(tasks.passages(write(tmp_path / "q.jsonl", lines)), 9, Characters())
    assert "".join(map(chr, task.prompts[1])) == "B is at home.\n\nQuestion: Is B?\nAnswer:"
    engine: Any = FakeEngine({"Is A?": " a\nand so on", "Is B?": " maybe B", "Is C?": "C"})
    nothing: Any = None
    assert task.run(engine, "full", nothing) == {"is_right": [True, False, True]}
