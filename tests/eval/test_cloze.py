"""Passages that break off before a name: which, and always the same."""

import itertools

from vllm_sepllm.eval.cloze import questions

TEXT = (
    "Here came old Brice with a lamp . Nobody had seen him for a day or two and when at last "
    "they found Brice he said that Miss Porter was ill . Brice laughed ."
)


def ask(min_distance: int) -> list[tuple[str, str]]:
    found = questions(TEXT, num_words=22, num=9, min_distance=min_distance)
    return [(context.split()[-1], name) for context, name in found]


def test_only_names_in_mid_sentence_that_were_told_before() -> None:
    # neither Nobody and Porter, which are new, nor Miss, nor what opens a sentence
    assert ask(1) == [("found", "Brice")]
    # which is 20 words behind the first
    assert ask(20) == [("found", "Brice")]
    assert ask(21) == []


def test_a_passage_has_its_words_and_goes_on_with_the_answer() -> None:
    ((context, name),) = questions(TEXT, num_words=22, num=9, min_distance=1)
    assert len(context.split()) == 22
    assert f"{context} {name}" in TEXT


def test_questions_are_spread_over_the_text() -> None:
    text = " ".join(f"so {i} said Brice" for i in range(100))
    found = list(questions(text, num_words=10, num=4, min_distance=1))
    numbers = [int(context.split()[-2]) for context, _ in found]
    assert len(numbers) == 4
    assert min(b - a for a, b in itertools.pairwise(numbers)) > 20
