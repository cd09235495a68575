"""lm_eval's tasks on local files: prompts, what counts as right, one cell a method."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="an extra")

from lm_eval.api.model import LM

from vllm_sepllm.eval import tasks


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class FakeModel(LM):  # type: ignore[misc]  # lm_eval has no types
    """Answers each question by what ``knows`` says; finds an answer as probable as it is long."""

    def __init__(self, knows: dict[str, str]) -> None:
        super().__init__()
        self.knows = knows

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        assert all(request.args[1]["until"] == ["Q:"] for request in requests)
        last = [request.args[0].rpartition("Q")[2] for request in requests]
        return [next((a for q, a in self.knows.items() if q in text), "?") for text in last]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        return [(-2.0 * len(a), any(q in p for q in self.knows)) for p, a in pairs]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


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
    prompts = ["".join(map(chr, span.token_ids)) for span in task.spans]
    assert [p.count("Q: ") for p in prompts] == [9] * 4
    assert all(p.endswith("\nA:") for p in prompts)
    # no question is its own example
    assert all(p.count(p[p.rindex("Q: ") :]) == 1 for p in prompts)
    assert task.length == max(map(len, prompts)) + tasks.MAX_ANSWER_TOKENS + 1
    assert task.spans[0].first == len(task.spans[0].token_ids) - 1
    engine = FakeModel(
        {"What is 1 ": "so 5, no: $1,107.", "What is 2 ": "7", "What is 4 ": "It is 4107"}
    )
    nothing: Any = None
    assert task.run(engine, "full", nothing) == {"is_right": [True, False, False, True]}


def test_known_answers_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"question": f"What is {i}?", "answer": f"So.\n#### {i}"} for i in range(12)]
    task = tasks.make_task(tasks.gsm8k_answers(write(tmp_path / "g.jsonl", lines)), 3, Characters())
    for number, span in enumerate(task.spans):
        text = "".join(map(chr, span.token_ids))
        assert text.count("Q: ") == 9
        # the query at ``first`` is the last of the prompt, and the answer's last token asks nothing
        assert text[: span.first + 1].endswith(f"What is {number}?\nA:")
        assert text[span.first + 1 :] + str(number) == f" So.\n#### {number}"
    nothing: Any = None
    found = task.run(FakeModel({"What is 1?\nA:": ""}), "full", nothing)
    assert found["nll"] == [2.0] * 3
    assert len(found["is_right"]) == 3


def test_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"context": f"{n} is at home.", "question": f"Is {n}?", "answer": n} for n in "ABC"]
    lines.append({"context": "Who is at home is", "question": "", "answer": "D"})
    task = tasks.make_task(tasks.passages(write(tmp_path / "q.jsonl", lines)), 9, Characters())
    texts = ["".join(map(chr, span.token_ids)) for span in task.spans]
    # but for the last character of the answer, which asks nothing
    assert texts[1] == "B is at home.\n\nQuestion: Is B?\nAnswer: "
    assert texts[3] == "Who is at home is "
    nothing: Any = None
    found = task.run(FakeModel({"Is A?": "", "Is C?": ""}), "full", nothing)
    assert found == {"is_right": [True, False, True, False], "nll": [2.0] * 4}
