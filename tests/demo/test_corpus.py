"""The bundled documents are long enough to matter and short enough for the model."""

from pathlib import Path

import pytest

from vllm_sepllm.demo.corpus import QUESTIONS, Question, chat
from vllm_sepllm.sample import FOLDER, documents


def test_every_document_is_named_in_the_source_list() -> None:
    listed = (FOLDER / "README.md").read_text()
    assert len(documents()) == 6
    assert all(f"| {title}.txt |" in listed for title in documents())


@pytest.mark.parametrize("num_characters", [None, 8400])
def test_every_question_is_answered_by_its_text_in_one_place(num_characters: int | None) -> None:
    texts = documents()
    assert QUESTIONS.keys() == texts.keys()
    told = {t: question.part_of(texts[t], num_characters) for t, question in QUESTIONS.items()}
    assert all(told[title].count(question.told) == 1 for title, question in QUESTIONS.items())
    # at least four characters a token: two are told in the window of 508, the others long before
    behind = [len(told[title].partition(question.told)[2]) for title, question in QUESTIONS.items()]
    assert sorted(length < 600 for length in behind) == [False] * 4 + [True] * 2
    assert all(length < 600 or length > 4000 for length in behind)


def test_an_answer_is_right_with_the_words_of_the_document() -> None:
    question = Question("why?", "Because\nit is")
    assert question.is_answered_by("Well, because it  is so.")
    assert not question.is_answered_by("Because.")


def test_question_follows_the_document() -> None:
    assert chat("text", "why?") == [{"role": "user", "content": "text\n\nwhy?"}]


@pytest.mark.slow
def test_a_document_and_its_answer_fit_the_model(smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(smollm2_path).apply_chat_template
    lengths = {
        title: len(template(chat(text, QUESTIONS[title].text), return_dict=True)["input_ids"])
        for title, text in documents().items()
    }
    assert all(6000 < length < 8192 - 256 for length in lengths.values()), lengths
