"""Which token ids are separators, derived from any tokenizer's vocabulary.

Two rules, on a token's surface (the exact text that it stands for, blanks included):

paper     The authors' rule (arXiv:2412.12094 and their published id lists): one of
          ``. , ? ! ; :`` blank, tab, newline, with a blank before and/or after it, if that is ONE
          token. Runs of two or three blanks follow from it. The paper names the tab; the authors'
          lists for Llama-3 leave it out. Models trained with SepLLM need their own exact list.
extended  For training-free use, every token that closes a segment: text by ``closes_segment``,
          the control tokens of chat templates and documents by ``is_boundary``.

A rule sees single tokens, not their context: ``.`` counts in ``3.14`` too, as it does in the paper.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from vllm_sepllm.policy.separators.vocabulary import Tokenizer, Vocabulary, read_vocabulary

SeparatorRule = Literal["paper", "extended"]
SeparatorSpec = SeparatorRule | Sequence[str] | Sequence[int]

_ASCII_MARKS = ".,?!;:"
_ASCII_QUOTES = "\"'`"
_BLANKS = frozenset(" \t\N{IDEOGRAPHIC SPACE}")
_LINE_BREAKS = frozenset("\n\r\v\f\x85\u2028\u2029")
# punctuation of other scripts tells its use in its Unicode name ...
_MARK_NAME = re.compile("STOP|COMMA|COLON|QUESTION|EXCLAMATION|DANDA|ELLIPSIS|TELEIA|INTERROBANG")
# ... but for Hebrew sof pasuq, Tibetan shad and nyis shad, Myanmar little section and section,
# Khmer khan and bariyoosan
_OTHER_MARKS = frozenset("\u05c3\u0f0d\u0f0e\u104a\u104b\u17d4\u17d5")
# a digit numbers reserved slots and codes of other modalities; the words name fillers, of which a
# request may hold thousands in a row
_NO_BOUNDARY = re.compile(r"\d|pad|unk|mask|image|img|audio|video|patch", re.IGNORECASE)


def paper_surfaces() -> frozenset[str]:
    """The surfaces of the paper's rule; which of them exist depends on the vocabulary."""
    bases = (*_ASCII_MARKS, " ", "\t", "\n")
    blanks = ("", " ")
    return frozenset(
        before + base + after for base in bases for before in blanks for after in blanks
    )


def closes_segment(surface: str) -> bool:
    """Whether a token that stands for this text closes a segment: the extended rule.

    1. Text whose trailing white space holds a line break does, whatever stands before it.
    2. Other text of nothing but white space does if it is one to three blanks or tabs. A longer run
       indents the line that follows, and the line break before it counts already: with Llama-3
       such runs would be 7 % of the tokens of Python code. Nor do no-break and thin spaces, which
       join.
    3. Of any other text leave out trailing white space, quotes, closing brackets and Markdown's
       ``**``: what remains must end in a mark, ``. , ? ! ; :`` or its like in another script.
    4. A mark of another script (ideographic full stop, danda, ellipsis) closes, whatever precedes.
    5. An ASCII mark does not close in text with a letter or digit (abbreviations, numbers,
       entities), with ``::`` or just two dots, or with a bracket left open. ``. ? ! :`` must follow
       nothing, white space, a quote, a closing bracket, a percent sign or another script's mark:
       elsewhere they are operators (``#!``, ``/?``, ``*.``).

    Apostrophes, hyphens, dashes, slashes, opening brackets and inverted marks are no marks.
    """
    core = surface.rstrip()
    if not _LINE_BREAKS.isdisjoint(surface[len(core) :]):
        return True
    if not core:
        return 1 <= len(surface) <= 3 and _BLANKS.issuperset(surface)
    body = core.replace("**", "")
    while body and (body[-1].isspace() or _is_closer(body[-1])):
        body = body[:-1]
    if not body or not _is_mark(body[-1]):
        return False
    return not body[-1].isascii() or _ascii_mark_closes(body)


def _ascii_mark_closes(body: str) -> bool:
    """Point 5 of the extended rule, for text that ends in an ASCII mark."""
    head = body.rstrip(_ASCII_MARKS)
    marks = body[len(head) :]
    num_open = sum(map(body.count, "([{")) - sum(map(body.count, ")]}"))
    if any(map(str.isalnum, body)) or "::" in marks or marks == ".." or num_open > 0:
        return False
    if not head or marks[-1] in ",;":
        return True
    last = head[-1]
    return last.isspace() or last == "%" or _is_closer(last) or _is_mark(last)


@lru_cache(maxsize=4096)
def _is_mark(char: str) -> bool:
    """Whether a character ends sentences or clauses in some script."""
    if char.isascii():
        return char in _ASCII_MARKS
    if unicodedata.category(char) != "Po":
        return False
    name = unicodedata.name(char, "")
    # Spanish inverted marks open a sentence
    return char in _OTHER_MARKS or ("INVERTED" not in name and bool(_MARK_NAME.search(name)))


@lru_cache(maxsize=4096)
def _is_closer(char: str) -> bool:
    """Whether a character is a closing bracket or a quote (German closes with an initial one)."""
    return char in _ASCII_QUOTES or unicodedata.category(char) in ("Pe", "Pf", "Pi")


def is_boundary(content: str) -> bool:
    """Whether a control token closes a segment: turns, roles, documents, tool calls, BOS, EOS.

    Not: padding, unknown, mask, fillers of other modalities, numbered and reserved tokens. BOS is
    in (the authors' Llama-3 list has it): at position 0 it is an initial token anyway, further on
    it begins another document.
    """
    return _NO_BOUNDARY.search(content) is None


def separator_ids(
    spec: SeparatorSpec, tokenizer: Tokenizer | None, vocab_size: int | None = None
) -> tuple[int, ...]:
    """Token ids of the separators that a configuration names.

    Args:
        spec: a rule; or strings, each the exact surface of a token (where several tokens share it,
            all count) or the content of a control token; or token ids. [] names none, which is
            StreamingLLM's mask.
        tokenizer: the model's; None will do for token ids if ``vocab_size`` is given.
        vocab_size: the model's; None: one more than the tokenizer's highest id.

    Returns:
        Ids in [0, vocab_size), ascending, each once. A tokenizer's tokens beyond the model's
        vocabulary never occur in a request: rules and strings leave them out.

    Raises:
        ValueError: if ``spec`` is none of these, mixes them, or names what does not exist.
    """
    ids = _as_ids(spec)
    if ids == []:
        return ()
    if ids is not None and vocab_size is not None:
        return _checked_ids(ids, vocab_size)
    if tokenizer is None:
        raise ValueError(
            f"separators={spec!r} must be read from a tokenizer, got none; give token ids and the "
            "vocabulary size, or serve with a tokenizer"
        )
    vocabulary = read_vocabulary(tokenizer)
    size = vocabulary.size if vocab_size is None else vocab_size
    if ids is not None:
        return _checked_ids(ids, size)
    if isinstance(spec, str):
        found = _rule_ids(spec, vocabulary)
    else:
        found = _string_ids([str(item) for item in spec], vocabulary)
    return tuple(sorted(token_id for token_id in found if token_id < size))


def _as_ids(spec: SeparatorSpec) -> list[int] | None:
    """The ids if ``spec`` is a sequence of ids, None if it is a rule or strings.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(spec, str):
        if spec in ("paper", "extended"):
            return None
    elif isinstance(spec, Sequence):
        kinds = {type(item) for item in spec}
        if kinds == {str}:
            return None
        # a bool is an int, but never meant as a token id
        if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
            return [int(item) for item in spec]
    raise ValueError(
        "separators must be 'paper', 'extended', a list of strings or a list of token ids, "
        f"got {spec!r}; put a single string or id into a list, and do not mix the two"
    )


def _checked_ids(ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Ascending ids, each once; refuses ids outside [0, vocab_size)."""
    unique = sorted(set(ids))
    outside = [token_id for token_id in unique if not 0 <= token_id < vocab_size]
    if outside:
        raise ValueError(
            f"separators must be token ids in [0, {vocab_size}), the vocabulary, got {outside}; "
            "take the ids from this model's own tokenizer"
        )
    return tuple(unique)


def _rule_ids(rule: str, vocabulary: Vocabulary) -> list[int]:
    """Ids that the rule of this name selects."""
    if rule == "paper":
        wanted = paper_surfaces()
        found = [token_id for token_id, text in vocabulary.text.items() if text in wanted]
    else:
        found = [token_id for token_id, text in vocabulary.text.items() if closes_segment(text)]
        found += [token_id for token_id, tag in vocabulary.control.items() if is_boundary(tag)]
    if not found:
        raise ValueError(
            f"separators={rule!r} must find a token in the tokenizer's vocabulary of "
            f"{vocabulary.size}, got none; give a list of token ids ([] for no separators)"
        )
    return found


def _string_ids(strings: Sequence[str], vocabulary: Vocabulary) -> list[int]:
    """Ids of all tokens whose surface is one of ``strings``; each must have one."""
    wanted = set(strings)
    surfaces = vocabulary.text | vocabulary.control
    missing = sorted(wanted.difference(surfaces.values()) | (wanted & {""}))
    if missing:
        raise ValueError(
            f"separators must be strings that are one token each, got {missing}; write a blank as "
            "' ' and a newline as '\\n', leave out longer strings, or give token ids"
        )
    return [token_id for token_id, surface in surfaces.items() if surface in wanted]
