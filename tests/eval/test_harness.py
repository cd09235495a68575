"""lm_eval's tasks on local files: prompts, where answers end, and what counts as right."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="an extra")

from vllm_sepllm.eval import harness
from vllm_sepllm.eval.questions import Generated, Scored

LAST_NUMBER = {
    "name": "last-number",
    "filter": [
        {
            "function": "regex",
            "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
            "group_select": -1,
        },
        {"function": "take_first"},
    ],
}
OWN_EXAMPLES = {
    "fewshot_split": "test",
    "num_fewshot": 8,
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{answer.split('#### ')[-1]}}",
}
SCORED = OWN_EXAMPLES | {
    "output_type": "loglikelihood",
    "doc_to_target": " {{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def text_of(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve questions in GSM8K's form."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        {"question": f"What is {i} hundred and 7?", "answer": f"It is so.\n#### {i},107"}
        for i in range(1, 13)
    ]
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def make(config: dict[str, Any], file: Path, **given: Any) -> Any:
    given = {"solution": None, "num_asked": None, "num_a_round": None} | given
    return harness.make_task("gsm8k", config, file, Characters(), **given)


def test_gsm8k_as_the_paper_asks_it(file: Path) -> None:
    """lm_eval's own eight examples, and its two ways of reading an answer."""
    config = harness.read_config("gsm8k/gsm8k-cot.yaml")
    task = make(config, file, solution="answer", num_asked=4, num_a_round=2)
    assert isinstance(task, Generated)
    assert [len(items) for items in task.rounds] == [2, 2]
    assert len(task.items) == 12
    prompts = [text_of(item.prompt) for item in task.items]
    assert all(prompt.count("Q: ") == 9 for prompt in prompts)
    # the same examples before every question, so that the prefix is computed once
    assert len({prompt.rpartition("Q: ")[0] for prompt in prompts}) == 1
    assert prompts[2].endswith("\n\nQ: What is 3 hundred and 7?\nA:")
    assert prompts[0].count("The answer is") == 8
    assert task.sampling == {"max_tokens": 256, "stop": ["Q:", "</s>", "<|im_end|>"]}
    assert task.length == max(map(len, prompts)) + 257
    # windows are chosen on the queries that would write the file's solution
    span = task.items[0].span
    assert text_of(span.token_ids[span.first + 1 :]) == " It is so.\n#### 1,10"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" So it is 1,107. The answer is 1,107.", True, True),
        (" So it is 1107. The answer is 1107.\n\n", True, True),
        (" It must be 1107", False, True),
        (" The answer is 5. No: $1,107.", False, True),
        (" The answer is 1,107. Not 8", True, False),
        (" Nobody knows", False, False),
        ("", False, False),
    ],
)
def test_answers_are_read_by_rule_and_by_the_last_number(
    file: Path, text: str, strict: bool, flexible: bool
) -> None:
    task = make(harness.read_config("gsm8k/gsm8k-cot.yaml"), file)
    grade = task.items[0].grade
    assert grade(text) == {"strict-match": strict, "flexible-extract": flexible}
    # of one question, whatever was asked before
    assert task.items[1].grade(text)["flexible-extract"] is False
    assert grade(text) == {"strict-match": strict, "flexible-extract": flexible}


def test_examples_of_the_same_file_leave_the_question_out(file: Path) -> None:
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    config = OWN_EXAMPLES | {
        "output_type": "generate_until",
        "generation_kwargs": {"until": "Q:", "max_gen_toks": 64},
        "filter_list": [LAST_NUMBER],
        "metric_list": [metric | {"regexes_to_ignore": [",", r"\$", r"\.$"]}],
    }
    task = make(config, file)
    for item in task.items:
        prompt = text_of(item.prompt)
        assert prompt.count("Q: ") == 9
        assert prompt.count(prompt[prompt.rindex("Q: ") :]) == 1
    assert task.sampling == {"max_tokens": 64, "stop": ["Q:"]}
    assert task.items[3].grade("so 5, no: $4,107.") == {"last-number": True}


def test_known_answers_are_scored(file: Path) -> None:
    task = make(SCORED, file)
    assert isinstance(task, Scored)
    for number, item in enumerate(task.items, 1):
        assert text_of(item.prompt).endswith(f"What is {number} hundred and 7?\nA:")
        assert text_of(item.answer) == f" It is so.\n#### {number},107"
        assert item.span.first == len(item.prompt) - 1
    assert task.length == max(len(i.prompt) + len(i.answer) for i in task.items) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_type": "multiple_choice"}, "must be generate_until or loglikelihood"),
        ({"doc_to_text": "{{ no such"}, "lm_eval makes no task"),
        (
            {"output_type": "generate_until", "metric_list": [{"metric": "bleu"}]},
            "the only metric of generated answers is exact_match",
        ),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(
    file: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(SCORED | change, file)


def test_a_task_that_lm_eval_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"no task file gsm9k\.yaml"):
        harness.read_config("gsm9k.yaml")


def test_answers_are_stored_with_their_tokens(file: Path) -> None:
    task = make(harness.read_config("gsm8k/gsm8k-cot.yaml"), file)

    class Engine:
        def generate(self, prompts: Any, **sampling: Any) -> Any:
            assert sampling == task.sampling
            text = " The answer is 2,107."
            for number in reversed(range(len(prompts))):
                answer = SimpleNamespace(text=text, token_ids=(7, 8))
                yield number, SimpleNamespace(outputs=[answer])

    found = dict(task.run(cast(Any, Engine()), task.items[:3], "gsm8k/full", cast(Any, None)))
    assert [item for item, answer in found.items() if answer["right"]["strict-match"]] == ["1"]
    assert found["0"]["token_ids"] == [7, 8]
    (span,) = task.spans(task.items[:1], [found["0"]])
    assert span.token_ids == (*task.items[0].prompt, 7)
    assert span.first == len(task.items[0].prompt) - 1
