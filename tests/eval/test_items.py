"""Excerpts and needles: where they are, what fits, what is compared."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from vllm_sepllm.cli.tokens import load_tokenizer
from vllm_sepllm.eval.needle import MAX_ANSWER_TOKENS, Needles, hide, needles

torch = pytest.importorskip("torch")

from vllm_sepllm.eval.text import Excerpt, divergences, excerpts  # noqa: E402


def test_excerpts_fill_their_context_and_are_scored_in_their_second_half() -> None:
    found = excerpts("book", range(1000), [7], length=100, num_excerpts=3, num_positions=5)
    assert [item.name for item in found] == ["book-0", "book-1", "book-2"]
    for item, start in zip(found, (225, 451, 676), strict=True):
        assert item.token_ids == (7, *range(start, start + 98))
        # the query at 49 predicts the token at 50
        assert item.span.first == 49
        assert item.positions == [49, 61, 73, 85, 97]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="book has 150 tokens, but 2 excerpts of 100 are wanted"):
        excerpts("book", range(150), [], length=100, num_excerpts=2, num_positions=5)


def test_scored_halves_that_overlap_are_refused() -> None:
    """Of excerpts of 100 tokens, 50 apart at least: 99 + 3 * 50 for two."""
    wanted: Any = {"length": 100, "num_excerpts": 2, "num_positions": 5}
    with pytest.raises(ValueError, match="which need 249; give a longer text"):
        excerpts("book", range(248), [], **wanted)
    first, second = excerpts("book", range(249), [], **wanted)
    # the last token of the first, and the first that is predicted of the second
    assert first.token_ids[-1] < second.token_ids[second.span.first + 1]
    assert len(excerpts("book", range(99), [], **(wanted | {"num_excerpts": 1}))) == 1


def test_divergence_is_that_of_the_definition() -> None:
    p, q = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), np.array([[0.25, 0.5, 0.25]] * 2)
    with np.errstate(divide="ignore"):
        found = divergences(torch.tensor(np.log(p)), torch.tensor(np.log(q)))
    by_hand = [0.5 * np.log(2), 0.2 * np.log(0.8) + 0.3 * np.log(0.6) + 0.5 * np.log(2)]
    assert found == pytest.approx(by_hand)


def test_a_needle_stands_between_sentences() -> None:
    text = "One is here. Two is there. Three is gone."
    assert hide(text, "N.", 0.0) == "N. One is here. Two is there. Three is gone."
    assert hide(text, "N.", 0.4) == "One is here. N. Two is there. Three is gone."
    assert hide(text, "N.", 1.0) == "One is here. Two is there. Three is gone.N. "


class Chat:
    """A tokenizer of characters with a chat template."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: Any, **_options: Any) -> str:
        return f"<user>{messages[0]['content']}<assistant>"


def test_needles_fit_their_context_and_hold_their_answer() -> None:
    text = "A sentence of some length. " * 400
    found = needles(Chat(), [text], length=1000, depths=[0.0, 0.5, 1.0], num_repeats=2)
    assert [item.name for item in found] == ["0-0", "0.5-0", "1-0", "0-1", "0.5-1", "1-1"]
    for item in found:
        prompt = "".join(map(chr, item.token_ids))
        assert prompt.count(f" is {item.answer}.") == 1
        assert prompt.startswith("<user>")
        assert prompt.endswith("Answer with the number.<assistant>")
        assert len(item.token_ids) == 1000 - MAX_ANSWER_TOKENS
        assert item.span.first == len(item.token_ids) - 1
        at = prompt.index(item.answer) / len(prompt)
        assert abs(at - item.depth) < 0.2
    assert needles(Chat(), [text], length=1000, depths=[0.5], num_repeats=1)[0] == found[1]


@pytest.mark.parametrize("num_characters", [1, 400, 800])
def test_a_text_that_does_not_fill_the_context_is_refused(num_characters: int) -> None:
    text = ("A sentence of some length. " * 400)[:num_characters]
    with pytest.raises(ValueError, match=r"fills \d+ tokens of 976; give a longer text or a short"):
        needles(Chat(), [text], length=1000, depths=[0.5], num_repeats=1)


def test_a_context_that_does_not_hold_the_question_is_refused() -> None:
    text = "A sentence of some length. " * 400
    with pytest.raises(ValueError, match=r"holds no text: .* give a longer context"):
        needles(Chat(), [text], length=16, depths=[0.5], num_repeats=1)


def test_without_a_template_the_model_goes_on_with_the_sentence(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    (item,) = needles(tokenizer, ["The cat sat. " * 300], length=400, depths=[0.5], num_repeats=1)
    assert tokenizer.decode(item.token_ids).endswith(" is")
    assert len(item.token_ids) <= 400 - MAX_ANSWER_TOKENS


class FakeEngine:
    """Says the same to every question, the last one first."""

    def __init__(self, text: str) -> None:
        self.text = text

    def generate(self, prompts: Any, max_tokens: int) -> Iterator[tuple[int, Any]]:
        assert max_tokens == MAX_ANSWER_TOKENS
        for number in reversed(range(len(prompts))):
            yield number, SimpleNamespace(outputs=[SimpleNamespace(text=self.text)])


@pytest.mark.parametrize("form", ["{}", "{:,}", "{}1"])
def test_numbers_are_found_however_they_are_written(form: str) -> None:
    text = "A sentence of some length. " * 400
    items = needles(Chat(), [text], length=900, depths=[0.0, 0.5], num_repeats=1)
    task, store = Needles("needle-900", 900, tuple(items)), cast(Any, None)
    said = f"It is {form.format(int(items[1].answer))}."
    found = dict(task.run(cast(Any, FakeEngine(said)), items, "needle-900/sepllm", store))
    assert found["0.5-0"] == {"depth": 0.5, "is_found": True, "text": said}
    assert found["0-0"]["is_found"] is False


def test_excerpts_are_equal_by_value() -> None:
    assert Excerpt("a", 8, (1, 2), 3) == Excerpt("a", 8, (1, 2), 3)
