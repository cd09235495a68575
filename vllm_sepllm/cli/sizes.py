"""Sizes as people write them, ``20GiB`` and ``32k``, read strictly and printed back."""

import re
from fractions import Fraction

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TOKENS = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", re.ASCII)


def parse_bytes(text: str) -> int:
    """Bytes of ``20GiB``, ``512 MiB`` or ``1.5GB``; the unit is not optional.

    Raises:
        ValueError: if ``text`` is not a positive number of whole bytes with one of the units.
    """
    return _parse(text, _BYTES, "a size in bytes with a unit such as 20GiB, 512MiB or 80GB")


def parse_tokens(text: str) -> int:
    """Tokens of ``4096``, ``32k`` (32 x 1024) or ``1M`` (1024 x 1024).

    Raises:
        ValueError: if ``text`` is not a positive number of whole tokens.
    """
    return _parse(text, _TOKENS, "a number of tokens such as 4096, 32k (k = 1024) or 1M")


def _parse(text: str, units: dict[str, int], wanted: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in units:
        names = ", ".join(unit for unit in units if unit)
        raise ValueError(f"wanted {wanted}, got {text!r}; units are {names}")
    size = Fraction(match[1]) * units[match[2]]
    if size.denominator != 1 or size <= 0:
        raise ValueError(f"wanted {wanted}, got {text!r}, which is {float(size):g}")
    return int(size)


def format_bytes(size: int) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _BYTES[unit]:
            return f"{size / _BYTES[unit]:,.1f} {unit}"
    return f"{size} B"
