"""How many tokens at the start of a prompt every query reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.initial import Initial, end_token_id
from vllm_sepllm.policy.separators.vocabulary import Vocabulary

END = 2
# short lists of few ids, so that the end is often there, often at the bound, often twice
prompts = st.lists(st.integers(0, 4), max_size=12)
counts = st.integers(0, 12)


@given(counts, prompts)
def test_a_fixed_number_is_that_of_every_prompt(tokens: int, prompt: list[int]) -> None:
    fixed = Initial(tokens)
    assert fixed.of(prompt) == fixed.least == fixed.most == tokens
    assert fixed.is_in(prompt)


@given(prompts, st.integers(1, 12), counts)
def test_a_protected_prefix_ends_with_the_first_end_token(
    prompt: list[int], max_tokens: int, least: int
) -> None:
    """Or is of ``least`` tokens, where the first ``max_tokens`` have none."""
    protected = Initial(least, END, max_tokens)
    number = protected.of(prompt)
    assert protected.is_in(prompt) == any(t == END for t in prompt[:max_tokens])
    assert least == protected.least <= number <= protected.most
    if number > least:
        assert number <= max_tokens
        assert prompt[number - 1] == END
        assert END not in prompt[: number - 1]
    else:
        assert END not in prompt[least:max_tokens] or END in prompt[:least]


@given(prompts, prompts, prompts, st.integers(1, 12), counts)
def test_what_follows_the_prefix_does_not_change_it(
    system: list[int], one: list[int], other: list[int], max_tokens: int, least: int
) -> None:
    """Two chats with one system prompt have one policy, whatever follows; nor do later turns."""
    protected = Initial(least, END, max_tokens)
    system = [token for token in system if token != END] + [END]
    if len(system) <= max_tokens:
        assert protected.of(system) == protected.of(system + one) == protected.of(system + other)
        assert protected.of(system + one) == max(least, len(system))


def test_literals() -> None:
    protected = Initial(3, END, max_tokens=5)
    assert protected.of([END]) == protected.of([]) == protected.of([9] * 30) == 3
    assert protected.of([9, 9, 9, END, 9]) == 4
    assert protected.of([9, 9, 9, 9, END, 9]) == 5
    assert protected.of([9, 9, 9, 9, 9, END]) == 3
    assert protected.of([9, 9, 9, END, END]) == 4
    assert not protected.is_in([9, 9, 9, 9, 9, END])
    assert protected.most == 5
    assert Initial(8, END, max_tokens=5).most == 8


TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"


# the template writes two of the four control tokens
VOCABULARY = Vocabulary(
    text={0: "a", 1: "b", 2: "<", 3: "|", 4: "end"},
    control={5: "<|start|>", 6: "<|end|>", 7: "<|pad|>", 8: "<|extra|>"},
    size=9,
)


def test_the_end_of_a_prefix_is_a_token_or_its_id() -> None:
    assert end_token_id("<|end|>", VOCABULARY, 9, TEMPLATE) == 6
    assert end_token_id("end", VOCABULARY, 9, TEMPLATE) == 4
    assert end_token_id(7, None, 9, "") == 7


@pytest.mark.parametrize(
    ("given", "template", "sentence"),
    [
        ("<end>", TEMPLATE, r"one token .* got '<end>'; its chat template has '<\|end\|>', '<\|s"),
        ("ab", TEMPLATE, "must be the text of one token of the model's tokenizer"),
        ("<end>", "", "its chat template has no control token; leave protect out"),
        ("<end>", "{{ messages }}", "its chat template has no control token; leave protect out"),
        ("<|extra|>", TEMPLATE, "must be the text of one token"),  # beyond the model's vocabulary
        (9, TEMPLATE, r"a token id in \[0, 8\), the vocabulary, got 9"),
        (-1, TEMPLATE, r"a token id in \[0, 8\), the vocabulary, got -1"),
    ],
)
def test_what_is_no_token_is_refused_with_those_that_would_do(
    given: str | int, template: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        end_token_id(given, VOCABULARY, 8, template)


def test_a_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="must be read from a tokenizer, got none; give the token"):
        end_token_id("<|end|>", None, 9, TEMPLATE)
