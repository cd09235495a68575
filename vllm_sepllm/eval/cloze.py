"""Passages of books that break off before a name that they have told already.

As LAMBADA does, but for names, which are no separators: a method that has forgotten where the name
stood must do without.
"""

import re
from collections.abc import Iterator

_WORD = re.compile(r"\S+")
_NAME = re.compile(r"[A-Z][a-z]{3,}")
_OPENS_SENTENCE = re.compile(r"[.!?:;\"'_*-]$")
# words with a capital in titles and forms of address, which are no names
_NO_NAMES = frozenset(
    {"Chapter", "Lord", "Lady", "Miss", "Madame", "Sir", "King", "Queen", "Mister"}
)


def questions(text: str, num_words: int, num: int, min_distance: int) -> Iterator[tuple[str, str]]:
    """At most ``num`` passages and their names, evenly over a text.

    Args:
        text: of a book.
        num_words: of a passage.
        num: of passages.
        min_distance: words between the name and where the passage last told it, at least.
    """
    words = list(_WORD.finditer(text))
    names = {at: _name(words, at, num_words, min_distance) for at in range(num_words, len(words))}
    found = [(at, name) for at, name in names.items() if name is not None]
    chosen = [found[i * len(found) // num] for i in range(num)] if len(found) > num else found
    for at, name in chosen:
        yield text[words[at - num_words].start() : words[at - 1].end()], name


def _name(words: list[re.Match[str]], at: int, num_words: int, min_distance: int) -> str | None:
    """The word at ``at`` if it is a name in mid-sentence told before, far enough back."""
    name = _NAME.match(words[at][0])
    if name is None or name[0] in _NO_NAMES or _OPENS_SENTENCE.search(words[at - 1][0]):
        return None
    told = [i for i in range(at - num_words, at) if name[0] in words[i][0]]
    return name[0] if told and at - told[-1] >= min_distance else None
