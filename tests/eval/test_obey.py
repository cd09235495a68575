"""Instructions before long conversations: what is asked, and what counts as obeyed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.support.eval_fakes import FACTS, Start, Watcher
from vllm_sepllm.eval import report
from vllm_sepllm.eval import run as suite
from vllm_sepllm.eval.methods import Method
from vllm_sepllm.eval.obey import MAX_ANSWER_TOKENS, Instruction, obedience
from vllm_sepllm.eval.questions import Generated
from vllm_sepllm.eval.store import Store

TEXT = "A sentence of some length. " * 400
END = 1


class Chat:
    """A tokenizer of characters with a chat template; a turn ends with the token END."""

    chat_template: str | None = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [END if c == "|" else ord(c) for c in text]}

    def apply_chat_template(self, messages: Any, **_options: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}|" for m in messages) + "<assistant>"


def tasks(instruction: Instruction, num_items: int = 6) -> Generated:
    return obedience(
        Chat(),
        [TEXT],
        name=f"obey-{instruction}-4000",
        instruction=instruction,
        length=4000,
        num_items=num_items,
        num_a_round=None,
    )


def text_of(prompt: tuple[int, ...]) -> str:
    return "".join("|" if token == END else chr(token) for token in prompt)


@pytest.mark.parametrize("instruction", ["word", "tool"])
def test_the_system_prompt_alone_tells_what_is_wanted(instruction: Instruction) -> None:
    """It comes first, the conversation fills the context, the question comes last."""
    task = tasks(instruction)
    assert len({item.prompt for item in task.items}) == 6
    for item in task.items:
        # one more character may begin a passage
        assert 0 <= 4000 - MAX_ANSWER_TOKENS - len(item.prompt) < 64
        system, *turns, question, answer = text_of(item.prompt).split("|")
        assert system.startswith("<system>You are a helpful assistant")
        assert question.startswith("<user>")
        assert answer == "<assistant>"
        assert turns[0].startswith("<user>Passage 1:\n")
        replies = [turn.removeprefix("<assistant>") for turn in turns[1::2]]
        assert len(set(replies)) == len(replies) > 1
        known = "".join(map(chr, item.answer))
        assert item.grade is not None
        assert item.grade(known) == {"obeyed": True}
        wanted = known.split('"')[3] if instruction == "tool" else known[:-1].split()[-1]
        assert wanted in system
        assert wanted not in "".join([*turns, question])
    assert tasks(instruction, 2).items == task.items[:2]


def test_an_answer_that_ends_with_the_word_is_obedient() -> None:
    (item, *_) = tasks("word").items
    word = text_of(item.prompt).split('Your password is "')[1].partition('"')[0]
    assert item.grade is not None
    for text, is_obeyed in (
        (f"It is Paris. {word.upper()}.", True),
        (f'It is Paris, {word}"\n', True),
        (f"{word}: it is Paris.", False),
        (f"It is Paris, {word}s.", False),
        ("", False),
    ):
        assert item.grade(text) == {"obeyed": is_obeyed}


def test_the_right_tool_by_its_name_is_obedient() -> None:
    (item, *_) = tasks("tool").items
    name = "".join(map(chr, item.answer)).split('"')[3]
    others = [part.split('"')[0] for part in text_of(item.prompt).split('"name": "')[1:]]
    assert item.grade is not None
    assert name in others
    assert item.grade(f'```json\n{{"name": "{name}"}}\n```') == {"obeyed": True}
    for text in (*(f'{{"name": "{other}"}}' for other in others if other != name), "get_weather"):
        assert item.grade(text) == {"obeyed": False}


def test_methods_are_compared_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    """The rows of a prefix that is protected, and of a window with as much KV."""
    facts = replace(FACTS, max_model_len=4000)
    protected = {"protect": END, "max_protected": 2000, "window": 20}
    methods = [
        Method("full", None),
        Method("sepllm", {"window": 20}),
        Method("protected", protected),
        Method("streaming-llm", {"preset": "streaming-llm"}, "protected"),
    ]
    rows = suite.plan([tasks("word", 3)], methods, facts)
    assert [row.rival for row in rows] == [None, None, "streaming-llm", "streaming-llm"]
    store, start = Store(tmp_path, {}), Start()
    start.stops_after = 2
    with pytest.raises(KeyboardInterrupt):
        suite.run(rows, store, "m", {}, Watcher(), start)
    store.close()
    store, watcher = Store(tmp_path, {}), Watcher()
    assert suite.missing(rows, store) == 10
    suite.run(rows, store, "m", {}, watcher, Start())
    assert watcher.answers.count("obey-word-4000/full") == 1
    found = {result.method: result for result in report.results(rows, store, facts)}
    number = len(text_of(tasks("word", 1).items[0].prompt).split("|")[0]) + 1
    assert abs(found["protected"].kept - found["sepllm"].kept - number) < 10
    assert found["streaming-llm"].kept == pytest.approx(found["protected"].kept, rel=0.02)
    assert found["full"].values["right obeyed"].mean == 0.0
    assert "rival obeyed" in found["protected"].values
    assert "| task | method | KV at the answer | of full | obeyed |" in report.markdown(
        list(found.values())
    )


def test_a_model_without_a_chat_template_is_refused() -> None:
    tokenizer = Chat()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="task obey: a system prompt needs a model with a chat"):
        obedience(
            tokenizer,
            [TEXT],
            name="obey",
            instruction="word",
            length=4000,
            num_items=1,
            num_a_round=None,
        )
