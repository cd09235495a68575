"""Separators: the rules against literal lists, and what a configuration may say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.rules import RULES, token_separators
from vllm_sepllm.policy.separators.surfaces import (
    closes_segment,
    ends_sentence,
    is_boundary,
    num_line_breaks,
    paper_surfaces,
)
from vllm_sepllm.policy.separators.vocabulary import read_vocabulary

BLANK = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
NEWLINE = "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"
TAB = "\N{LATIN SMALL LETTER C WITH CIRCUMFLEX}"
BYTE_LEVEL = str.maketrans({" ": BLANK, "\n": NEWLINE, "\t": TAB})

# (id, surface) as in the published vocabularies, checked against the tokenizers' own files
LLAMA_3 = {
    **{0: "!", 11: ",", 13: ".", 25: ":", 26: ";", 30: "?", 197: "\t", 198: "\n", 220: " "},
    **{256: "  ", 262: "   ", 551: " :", 662: " .", 720: " \n", 758: " !", 949: " ?"},
    **{1174: " ,", 2652: " ;", 3762: "\t ", 7163: " \t", 66597: " \t "},
    **{257: "    ", 271: "\n\n", 382: ".\n\n", 505: " have", 627: ".\n", 512: ":\n", 345: ',"'},
}
LLAMA_3_TAGS = {"<|begin_of_text|>": 128000, "<|reserved_special_token_0|>": 128002}
LLAMA_3_TAGS |= {"<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009}
# the authors' lists, their masks' and their cache's, without BOS
LLAMA_3_PUBLISHED = {13, 11, 30, 0, 26, 25, 198, 220}
LLAMA_3_PUBLISHED |= {662, 1174, 949, 758, 2652, 551, 720, 256, 262}
NEOX = {
    **{2: "!", 13: ",", 15: ".", 27: ":", 28: ";", 32: "?", 186: "\t", 187: "\n", 209: " "},
    **{245: "  ", 341: "   ", 586: "\n ", 964: " .", 1157: " ,", 1163: " :", 2195: " !"},
    **{2490: " \n", 3706: " ;", 3736: " ?", 4928: " \n ", 28910: " \t", 253: " the", 535: "\n\n"},
}
NEOX_ADDED = {"<|endoftext|>": 0, "<|padding|>": 1, "   ": 50275, "  ": 50276}
NEOX_PUBLISHED = {15, 13, 32, 2, 28, 27, 209, 186, 187, 964, 1157, 3736, 2195, 3706, 1163}
NEOX_PUBLISHED |= {2490, 50276, 586, 4928, 50275}


@dataclass
class FakeTokenizer:
    """A tokenizer that is its vocabulary."""

    pieces: Mapping[str, int]
    added: Mapping[str, int] = field(default_factory=dict)
    all_special_ids: list[int] = field(default_factory=list)

    def get_vocab(self) -> dict[str, int]:
        return {**self.pieces, **self.added}

    def get_added_vocab(self) -> Mapping[str, int]:
        return self.added


def separator_ids(*given: Any, **more: Any) -> tuple[int, ...]:
    """Of a rule or list that reads single tokens."""
    found = token_separators(*given, **more)
    assert found == TokenSeparators(found.token_ids)
    return found.token_ids


def byte_level(surfaces: Mapping[int, str]) -> dict[str, int]:
    """Pieces of a byte-level vocabulary for ASCII surfaces."""
    return {text.translate(BYTE_LEVEL): token_id for token_id, text in surfaces.items()}


llama_3 = FakeTokenizer(byte_level(LLAMA_3), LLAMA_3_TAGS, all_special_ids=[128000, 128009])
neox = FakeTokenizer(byte_level(NEOX), NEOX_ADDED, all_special_ids=[0])


def test_paper_rule_on_llama_3_is_the_published_list_and_the_tab() -> None:
    assert set(separator_ids("paper", llama_3)) == LLAMA_3_PUBLISHED | {197, 3762, 7163, 66597}


def test_paper_rule_on_neox_is_the_published_list_and_its_twins() -> None:
    """245 and 341 are trained twins of the added runs of blanks, 28910 is a blank and a tab."""
    assert set(separator_ids("paper", neox)) == NEOX_PUBLISHED | {245, 341, 28910}


def test_extended_rule_on_llama_3() -> None:
    extended = set(separator_ids("extended", llama_3))
    assert extended - set(separator_ids("paper", llama_3)) == (
        {271, 382, 627, 512, 345} | {128000, 128006, 128007, 128009}
    )


def test_the_paper_rule_has_35_surfaces() -> None:
    surfaces = paper_surfaces()
    assert len(surfaces) == 35
    assert surfaces >= {".", " .", ". ", " . ", " ", "  ", "   ", "\t", "\n", " \n ", "; "}
    assert surfaces.isdisjoint({"", "    ", "..", "\n\n", ".\n"})


@pytest.mark.parametrize(
    "surface",
    [
        *(" ", "   ", "\n", "\r\n", "\t\t", "\n\n    ", " \n", "\N{IDEOGRAPHIC SPACE}"),
        *(".\n", ".\n\n", ",\n", ":\n", ")\n", " {\n", "else\n", '."', ").", ");", "();", '.")'),
        *("?!", "!!!", "...", " ...", '",', "':", "):", "},", "].", "%.", "%,", "++;", ":**"),
        *("**:", "**.", '":"', ' "",', "`.", "\\),", '. "', "\N{HORIZONTAL ELLIPSIS}."),
        "\N{IDEOGRAPHIC FULL STOP}",
        "\N{IDEOGRAPHIC COMMA}",
        "\N{FULLWIDTH COMMA}",
        "\N{FULLWIDTH SEMICOLON}",
        "\N{FULLWIDTH COLON}",
        "\N{FULLWIDTH QUESTION MARK}",
        "\N{FULLWIDTH EXCLAMATION MARK}\N{RIGHT CORNER BRACKET}\n",
        "\N{IDEOGRAPHIC FULL STOP}\N{RIGHT DOUBLE QUOTATION MARK}",
        "\u7684\N{FULLWIDTH COMMA}",  # a word and its mark in one token
        "\N{RIGHT DOUBLE QUOTATION MARK}.",
        ".\N{LEFT DOUBLE QUOTATION MARK}",
        "\N{ARABIC COMMA}",
        "\N{ARABIC QUESTION MARK}",
        "\N{DEVANAGARI DANDA}",
        "\N{ARMENIAN FULL STOP}",
        "\N{ETHIOPIC FULL STOP}",
        "\N{KHMER SIGN KHAN}",
        "\N{MYANMAR SIGN SECTION}",
        "\N{TIBETAN MARK SHAD}",
        "\N{HORIZONTAL ELLIPSIS}",
    ],
)
def test_closes_segment(surface: str) -> None:
    assert closes_segment(surface)


@pytest.mark.parametrize(
    "surface",
    [
        *("", "a", " the", "3.", "3.14", "1,", "etc.", "e.g.", "https:", "&amp;", ".5", ".py"),
        *("'", "'s", '"', "-", "--", " -", "/", "_", "*", "**", " **", "(", " (", "[", ")", "))"),
        *("::", " ::", "std::", "..", "../", "./", "://", "#!", "<!", "/?", "(?:", "[:", "[:,"),
        *("(.", "*.", "$.", ".(", ":[", "!=", ":=", ".__", "->", "=>", "\nimport", "...x"),
        *("    ", "\t" * 4, " " * 7, "\N{NO-BREAK SPACE}", "\N{THIN SPACE}"),
        "\N{INVERTED QUESTION MARK}",
        "\N{INVERTED EXCLAMATION MARK}",
        "\N{EM DASH}",
        "\N{MIDDLE DOT}",
        "\N{KATAKANA MIDDLE DOT}",
        "\N{LEFT CORNER BRACKET}",
        "\N{RIGHT CORNER BRACKET}",
        "\N{RIGHT SINGLE QUOTATION MARK}",
        "\N{SECTION SIGN}",
        "\N{COLON SIGN}",  # a currency
        "\u7684",
    ],
)
def test_does_not_close_segment(surface: str) -> None:
    assert not closes_segment(surface)


@pytest.mark.parametrize("surface", sorted(paper_surfaces()))
def test_every_surface_of_the_paper_closes_a_segment(surface: str) -> None:
    assert closes_segment(surface)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *[(tag, True) for tag in ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>")],
        *[(tag, True) for tag in ("<|start_header_id|>", "[INST]", "</think>", "<|vision_start|>")],
        *[(tag, False) for tag in ("<pad>", "<unk>", "[MASK]", "<|image_pad|>", "[IMG]")],
        *[(tag, False) for tag in ("<|audio|>", "<|reserved_special_token_0|>", "<unused12>")],
    ],
)
def test_is_boundary(content: str, expected: bool) -> None:
    assert is_boundary(content) is expected


def test_strings_are_surfaces_or_contents_of_control_tokens() -> None:
    assert separator_ids([" .", "<|eot_id|>", "\n"], llama_3) == (198, 662, 128009)


def test_a_string_stands_for_all_tokens_of_its_surface() -> None:
    assert separator_ids(["  "], neox) == (245, 50276)


def test_token_ids_are_sorted_and_unique() -> None:
    assert separator_ids([13, 0, 13], llama_3) == (0, 13)
    assert separator_ids([np.int64(7)], None, vocab_size=8) == (7,)  # type: ignore[list-item]


def test_an_empty_list_names_no_separator() -> None:
    assert separator_ids([], None) == ()
    assert separator_ids([], llama_3) == ()


def test_tokens_beyond_the_models_vocabulary_are_left_out() -> None:
    assert separator_ids("paper", llama_3, vocab_size=26) == (0, 11, 13, 25)
    assert separator_ids(["."], llama_3, vocab_size=14) == (13,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("papers", r".paper., .extended., .* got .papers."),
        (".", r"got '\.'; put a single string or id into a list"),
        (13, r"a list of token ids, got 13"),
        (None, r"got None"),
        ([".", 13], r"do not mix the two"),
        ([True], r"got \[True\]"),
        ([1.0], r"got \[1\.0\]"),
        ([-1], r"\[0, 128010\), the vocabulary, got \[-1\]"),
        ([5, 128010], r"got \[128010\]; take the ids from this model's own tokenizer"),
        ([""], r"one token each, got \[''\]"),
        ([".", "the cat", f"{BLANK}."], r"got \['the cat', '.*'\]; write a blank as ' '"),
    ],
)
def test_refuses(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"separators must .*{message}"):
        separator_ids(spec, llama_3)


def test_refuses_a_rule_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"separators='paper' must be read from a tokenizer"):
        separator_ids("paper", None, vocab_size=100)


def test_refuses_the_empty_string_though_a_token_be_empty() -> None:
    with pytest.raises(ValueError, match=r"one token each, got \[''\]"):
        separator_ids([""], FakeTokenizer({"": 0, ".": 1}))


@pytest.mark.parametrize(
    "surface",
    [
        *(".", " .", "?", "!", "?!", "...", '."', ".)", '.")', ".**", "%.", ". ", ".\n", '!"\n'),
        *("\n\n", ".\n\n", ",\n\n", "}\n\n", "word\n\n", "\r\n\r\n", "\n \n"),
        "\N{IDEOGRAPHIC FULL STOP}\N{RIGHT CORNER BRACKET}",
        "\u7684\N{FULLWIDTH QUESTION MARK}",
        "\N{FULLWIDTH EXCLAMATION MARK}\n",
        "\N{HORIZONTAL ELLIPSIS}",
        "\N{DEVANAGARI DANDA}",
        "\N{ARABIC QUESTION MARK}",
        "\N{ARABIC FULL STOP}",
        "\N{ARMENIAN FULL STOP}",
        "\N{ETHIOPIC FULL STOP}",
        "\N{GREEK QUESTION MARK}",
        "\N{KHMER SIGN KHAN}",
        "\N{MYANMAR SIGN SECTION}",
        "\N{TIBETAN MARK SHAD}",
        "\N{HEBREW PUNCTUATION SOF PASUQ}",
    ],
)
def test_ends_sentence(surface: str) -> None:
    assert ends_sentence(surface)


@pytest.mark.parametrize(
    "surface",
    [
        *("", " ", "  ", "\t", "\n", "\r\n", " \n", "\n    ", "word\n", "}\n", '"\n', ";\n"),
        *(",", ";", ":", ",\n", '",', "),", "):", ");", ".,", "e.g.", "3.", "..", "#!", "/?", "(."),
        "\N{IDEOGRAPHIC COMMA}",
        "\N{FULLWIDTH COMMA}",
        "\N{FULLWIDTH COLON}",
        "\N{FULLWIDTH SEMICOLON}",
        "\N{ARABIC COMMA}",
        "\N{ARABIC SEMICOLON}",
        "\N{GREEK ANO TELEIA}",
        "\N{ETHIOPIC COLON}",
        "\N{MYANMAR SIGN LITTLE SECTION}",
        "\N{INVERTED QUESTION MARK}",
    ],
)
def test_does_not_end_sentence(surface: str) -> None:
    assert not ends_sentence(surface)


def test_line_breaks_are_counted_at_the_end() -> None:
    texts = ["a", "\na", "a\n", "\r\n", "\r\n\r\n", "a\n \n\t", "\N{LINE SEPARATOR}"]
    assert [num_line_breaks(text) for text in texts] == [0, 0, 1, 1, 2, 2, 1]


WORDS = {0: "a", 1: ".", 2: "\n", 3: ",", 4: ".\n", 5: "\n\n", 6: " {\n", 7: '"\n', 8: " "}
WORDS |= {9: "\n  ", 10: '"', 11: " the\n\n", 13: "\r", 14: ".\r"}
words = FakeTokenizer(byte_level(WORDS), {"<|im_end|>": 12}, [12])


def kept(rule: Any, *text: str) -> str:
    """The text with a bar behind each separator; a line break as a slash."""
    ids = [(words.pieces | words.added)[piece.translate(BYTE_LEVEL)] for piece in text]
    mask = token_separators(rule, words).mask(ids)
    marked = (piece + "|" * flag for piece, flag in zip(text, mask.tolist(), strict=True))
    return "".join(marked).replace("\n", "/")


def test_unwrapped_leaves_out_line_breaks_in_mid_sentence() -> None:
    assert kept("extended", "a", "\n", "a", ".", "\n", "a") == "a/|a.|/|a"
    assert kept("unwrapped", "a", "\n", "a", ".", "\n", "a") == "a/a.|/|a"
    assert kept("unwrapped", "a", ",", "\n  ", "a", "\n  ") == "a,|/  |a/  "
    # merged with what stands before, a line break counts as that does
    assert kept("unwrapped", "a", ".\n", "a", " {\n", "a", "\n\n") == "a./|a {/a//|"
    assert kept("unwrapped", "a", '"\n', ".", '"\n') == 'a"/.|"/|'
    # an empty line is two line breaks, whatever the first one is part of
    assert kept("unwrapped", "a", "\n", "\n", " {\n", "\n") == "a//| {//|"
    # a blank is a separator, but a line break behind it ends nothing
    assert kept("unwrapped", "a", " ", "\n", "a") == "a |/a"
    assert kept("unwrapped", "<|im_end|>", "\n", "a") == "<|im_end|>|/|a"
    assert kept("unwrapped", "\n", "a") == "/a"


def test_sentences_are_their_ends_and_those_of_paragraphs() -> None:
    assert kept("sentences", "a", ",", " ", "a", ".", "\n", "a", "\n", "a") == "a, a.|/a/a"
    assert kept("sentences", "a", ".\n", "a", " the\n\n", "a", "\n\n") == "a./|a the//|a//|"
    assert kept("sentences", "a", "\n", "\n", "\n  ", "a") == "a//|/  |a"
    assert kept("sentences", "a", ".\n", "\n", "a", '"\n', "a") == 'a./|/|a"/a'
    assert kept("sentences", "<|im_end|>", "\n", "a") == "<|im_end|>|/a"
    assert kept("sentences", "\n", "a") == "/a"


def test_cr_lf_in_two_tokens_is_one_line_break() -> None:
    """As Llama-2's tokenizer cuts it."""
    assert kept("sentences", "a", "\r", "\n", "a", ".", "\r", "\n", "a") == "a\r/a.|\r/a"
    assert kept("sentences", "a", "\r", "\n", "\r", "\n", "a") == "a\r/\r|/a"
    assert kept("sentences", "a", ".\r", "\n", "a") == "a.\r|/a"
    assert kept("unwrapped", "a", "\r", "\n", "a", ".", "\r", "\n", "a") == "a\r/a.|\r|/a"
    assert kept("unwrapped", "a", "\r", "\n", "\r", "\n", "a") == "a\r/\r|/a"
    assert kept("unwrapped", "a", ".\r", "\n", "a") == "a.\r|/a"


def test_separators_of_two_tokens_are_checked_like_ids() -> None:
    given = TokenSeparators((3, 1, 1), (2,), (1,))
    assert token_separators(given, None, vocab_size=4) == TokenSeparators((1, 3), (2,), (1,))
    for wrong in (TokenSeparators((), (4,)), TokenSeparators((), (), (4,))):
        with pytest.raises(ValueError, match=r"must be token ids in \[0, 4\)"):
            token_separators(wrong, None, vocab_size=4)
    # what lies beyond the model's vocabulary never occurs
    assert token_separators("unwrapped", words, 5).line_breaks == (2,)


def test_refuses_a_rule_that_finds_nothing() -> None:
    """Silently it would be StreamingLLM's mask."""
    with pytest.raises(ValueError, match=r"must find a token .* vocabulary of 2, got none"):
        separator_ids("paper", FakeTokenizer(byte_level({0: "a", 1: " b"})))


surfaces = st.text(st.sampled_from(" \n\t.,;:?!\"')]([*a1-/"), min_size=1, max_size=5)


@given(st.lists(surfaces, min_size=1, max_size=30, unique=True))
def test_paper_is_a_part_of_extended_and_both_are_ascending(texts: list[str]) -> None:
    texts = [*texts, " x", " y", "z."]
    tokenizer = FakeTokenizer(byte_level({2 * i: text for i, text in enumerate([*texts, "."])}))
    sets = {rule: token_separators(rule, tokenizer) for rule in RULES if rule != "sentences"}
    paper, extended = sets["paper"].token_ids, sets["extended"].token_ids
    unwrapped = sets["unwrapped"]
    assert set(paper) <= set(extended)
    assert set(unwrapped.token_ids) <= set(extended)
    assert set(unwrapped.line_breaks) <= set(extended) - set(unwrapped.token_ids)
    assert set(unwrapped.closers) <= set(extended)
    for ids in (paper, extended, unwrapped.token_ids):
        assert list(ids) == sorted(set(ids))
        assert set(ids) <= set(read_vocabulary(tokenizer).text)


def smollm2(folder: Path) -> tuple[Any, FakeTokenizer]:
    """The backend of SmolLM2's tokenizer and what our code reads of it."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    return backend, FakeTokenizer(backend.get_vocab(with_added_tokens=False), added, [0, 1, 2])


@pytest.mark.slow
def test_rules_on_smollm2(smollm2_path: Path) -> None:
    backend, tokenizer = smollm2(smollm2_path)
    paper = {17, 28, 30, 42, 43, 47, 197, 198, 216, 256, 333}
    paper |= {1577, 1673, 3297, 3717, 3805, 5728, 8544, 9148}
    assert set(separator_ids("paper", tokenizer)) == paper
    extended = separator_ids("extended", tokenizer)
    assert set(extended) >= paper | {0, 1, 2}
    text = 'Yes, he did ("at last"). Done!\n\nx = [1, 2];'
    ids = backend.encode(text, add_special_tokens=False).ids
    closing = [backend.decode([token_id]) for token_id in ids if token_id in extended]
    assert closing == [",", '").', "!", "\n", "\n", ",", " ", "];"]


@pytest.mark.slow
def test_surfaces_of_smollm2_equal_what_it_decodes(smollm2_path: Path) -> None:
    backend, tokenizer = smollm2(smollm2_path)
    vocabulary = read_vocabulary(tokenizer)
    surfaces = vocabulary.text | vocabulary.control
    for token_id in range(vocabulary.size):
        decoded = backend.decode([token_id], skip_special_tokens=False)
        # the replacement character: a part of a character, or the one token that is it
        if "\ufffd" not in decoded or token_id in surfaces:
            assert surfaces[token_id] == decoded
    assert len(surfaces) == 48_839
