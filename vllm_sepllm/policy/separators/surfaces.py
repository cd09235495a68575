"""What the text of one token says of segments and sentences.

``.`` counts in ``3.14`` too where it is a token of its own, as it does in the paper: a surface says
nothing of its neighbours.
"""

import re
import unicodedata
from functools import lru_cache

_ASCII_MARKS = ".,?!;:"
_ASCII_QUOTES = "\"'`"
_BLANKS = frozenset(" \t\N{IDEOGRAPHIC SPACE}")
_LINE_BREAKS = frozenset("\n\r\v\f\x85\u2028\u2029")
# punctuation of other scripts tells its use in its Unicode name ...
_MARK_NAME = re.compile("STOP|COMMA|COLON|QUESTION|EXCLAMATION|DANDA|ELLIPSIS|TELEIA|INTERROBANG")
# ... and of those not its sentence enders; the ano teleia is the Greek semicolon
_INNER_MARK_NAME = re.compile("COMMA|COLON|TELEIA")
# ... but for Hebrew sof pasuq, Tibetan shad and nyis shad, Myanmar little section and section,
# Khmer khan and bariyoosan
_OTHER_MARKS = frozenset("\u05c3\u0f0d\u0f0e\u104a\u104b\u17d4\u17d5")
_ASCII_ENDERS = ".?!"
_MYANMAR_LITTLE_SECTION = "\u104a"  # a comma
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
    if num_line_breaks(surface):
        return True
    if is_blank(surface):
        return 1 <= len(surface) <= 3 and _BLANKS.issuperset(surface)
    return _ends_in_mark(surface)


def ends_sentence(surface: str) -> bool:
    """Whether a token that stands for this text ends a sentence or a paragraph.

    As :func:`closes_segment`, with fewer marks and breaks: ``. ? !`` and their like in other
    scripts end a sentence, two line breaks at the end of the text a paragraph. Commas, colons,
    semicolons, blanks and a single line break end neither.
    """
    if num_line_breaks(surface) > 1:
        return True
    body = _without_closers(surface)
    return bool(body) and _is_ender(body[-1]) and _ends_in_mark(surface)


def num_line_breaks(surface: str) -> int:
    """Line breaks in the white space that a text ends with; CR LF is one."""
    tail = surface[len(surface.rstrip()) :].replace("\r\n", "\n")
    return sum(map(_LINE_BREAKS.__contains__, tail))


def is_blank(surface: str) -> bool:
    """Whether a text is white space alone, or nothing."""
    return not surface.strip()


def is_closing(surface: str) -> bool:
    """Whether a text is nothing but quotes, closing brackets and white space."""
    return not _without_closers(surface)


def _without_closers(surface: str) -> str:
    """A text without the white space, quotes, closing brackets and ``**`` that it ends with."""
    body = surface.replace("**", "")
    while body and (body[-1].isspace() or _is_closer(body[-1])):
        body = body[:-1]
    return body


def _ends_in_mark(surface: str) -> bool:
    """Points 3 to 5 of the extended rule."""
    body = _without_closers(surface)
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
def _is_ender(char: str) -> bool:
    """Whether a mark ends sentences, not clauses."""
    if char.isascii():
        return char in _ASCII_ENDERS
    is_inner = _INNER_MARK_NAME.search(unicodedata.name(char, "")) is not None
    return _is_mark(char) and not is_inner and char != _MYANMAR_LITTLE_SECTION


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
