"""The exact text that each token of a tokenizer stands for."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# how SentencePiece and GPT-2's byte alphabet write a blank
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_LEVEL_BLANK = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)


class Tokenizer(Protocol):
    """What is read of a tokenizer: Hugging Face's (fast, slow) and vLLM's have all of it."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the named special tokens; chat templates use others as well."""

    def get_vocab(self) -> Mapping[str, int] | Mapping[bytes, int]:
        """Piece -> id. The pieces of some tiktoken-based tokenizers are bytes."""

    def get_added_vocab(self) -> Mapping[str, int]:
        """Content -> id of the tokens that were added to the trained vocabulary."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Surfaces of a tokenizer's tokens; tokens that hold a part of a character are left out.

    Attributes:
        text: id -> exact text, blanks included, of the tokens that text is made of.
        control: id -> content of the control tokens (turns, roles, padding, ...).
        size: one more than the highest id, left out or not.
    """

    text: dict[int, str]
    control: dict[int, str]
    size: int


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Surface of each token, from the pieces as the vocabulary writes them.

    ``decode`` is not asked: it drops leading blanks in some tokenizers and is slow one by one.
    Byte pieces (``<0x0A>``) become their byte, added tokens of a byte-level vocabulary are text.

    Control tokens are the named special tokens and every added token that looks like a tag: neither
    list is complete, ``all_special_ids`` misses Llama-3's ``<|start_header_id|>``, and Mistral's
    tokenizers report no added tokens.
    """
    pieces = tokenizer.get_vocab()
    special_ids = set(tokenizer.all_special_ids)
    added = tokenizer.get_added_vocab()
    surface_of = _surface_reader([piece for piece in pieces if piece not in added])
    text: dict[int, str] = {}
    control: dict[int, str] = {}
    for piece, token_id in pieces.items():
        surface = surface_of(piece) if isinstance(piece, str) else _from_bytes(piece)
        if token_id in special_ids and isinstance(piece, str):
            control[token_id] = piece
        elif surface is not None:
            text[token_id] = surface
    for content, token_id in added.items():
        if token_id in special_ids or _TAG.fullmatch(content):
            control[token_id] = content
            text.pop(token_id, None)
        elif surface_of is not _from_sentencepiece:
            # SentencePiece: Gemma adds runs of blanks in its own writing, read as such above
            text[token_id] = content
    size = 1 + max((*pieces.values(), *added.values()), default=-1)
    return Vocabulary(text, control, size)


def _surface_reader(trained: Sequence[str | bytes]) -> Callable[[str], str | None]:
    """How a vocabulary writes its trained pieces: as most of those that begin with a blank do.

    A single piece proves nothing: either sign may be a character of the text itself.
    """
    first = [piece[:1] for piece in trained]
    readers = {
        " ": _from_text,
        _BYTE_LEVEL_BLANK: _from_byte_level,
        _METASPACE: _from_sentencepiece,
    }
    return readers[max(readers, key=first.count)]


def _byte_numbers() -> dict[int, int]:
    """Code point -> byte of GPT-2's alphabet, where the two differ.

    Bytes that are visible in Latin-1 stand for themselves, the rest are numbered from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return dict(enumerate(hidden, start=0x100))


_BYTE_OF = _byte_numbers()


def _from_byte_level(piece: str) -> str | None:
    """Surface of a byte-level BPE piece; None for a part of a character."""
    try:
        return _from_bytes(piece.translate(_BYTE_OF).encode("latin-1"))
    except UnicodeEncodeError:
        # outside the alphabet, so it is written as it is
        return piece


def _from_bytes(piece: bytes) -> str | None:
    """Surface of UTF-8 bytes; None for a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _from_sentencepiece(piece: str) -> str | None:
    """Surface of a SentencePiece piece; None for a byte that is a part of a character."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return _from_bytes(bytes([int(match[1], 16)]))
    return piece.replace(_METASPACE, " ")


def _from_text(piece: str) -> str | None:
    """Surface of a piece that is decoded already; None if it holds a part of a character."""
    return None if "\ufffd" in piece else piece
