"""Which tokens are separators, derived from any tokenizer's vocabulary.

Rules on a token's surface (the exact text that it stands for, blanks included):

paper      The authors' rule (arXiv:2412.12094 and their published id lists): one of
           ``. , ? ! ; :`` blank, tab, newline, with a blank before and/or after it, if that is ONE
           token. Runs of two or three blanks follow from it. The paper names the tab; the authors'
           lists for Llama-3 leave it out. Models trained with SepLLM need their own exact list.
extended   For training-free use, every token that closes a segment: text by ``closes_segment``,
           the control tokens of chat templates and documents by ``is_boundary``.
unwrapped  The extended rule without the line breaks of hard-wrapped text, which close nothing: a
           single line break counts only behind a token that closes a segment or a line.
sentences  Sentence ends by ``ends_sentence``, paragraph ends and control tokens; two line breaks
           end a paragraph also where they are two tokens.

``paper`` and ``extended`` see single tokens, the others also the token before.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.surfaces import (
    closes_segment,
    ends_sentence,
    is_blank,
    is_boundary,
    is_closing,
    num_line_breaks,
    paper_surfaces,
)
from vllm_sepllm.policy.separators.vocabulary import Tokenizer, Vocabulary, read_vocabulary

SeparatorRule = Literal["paper", "extended", "unwrapped", "sentences"]
SeparatorSpec = SeparatorRule | TokenSeparators | Sequence[str] | Sequence[int]
RULES: tuple[SeparatorRule, ...] = get_args(SeparatorRule)


def token_separators(
    spec: SeparatorSpec, tokenizer: Tokenizer | None, vocab_size: int | None = None
) -> TokenSeparators:
    """The separators that a configuration names.

    Args:
        spec: a rule; or strings, each the exact surface of a token (where several tokens share it,
            all count) or the content of a control token; or token ids, also as a TokenSeparators.
            [] names none, which is StreamingLLM's mask.
        tokenizer: the model's; None will do for token ids if ``vocab_size`` is given.
        vocab_size: the model's; None: one more than the tokenizer's highest id.

    Returns:
        Ids in [0, vocab_size), ascending, each once. A tokenizer's tokens beyond the model's
        vocabulary never occur in a request: rules and strings leave them out.

    Raises:
        ValueError: if ``spec`` is none of these, mixes them, or names what does not exist.
    """
    given = _as_ids(spec)
    if given is not None and (given == TokenSeparators(()) or vocab_size is not None):
        return _checked(given, vocab_size or 0)
    if tokenizer is None:
        raise ValueError(
            f"separators={spec!r} must be read from a tokenizer, got none; give token ids and the "
            "vocabulary size, or serve with a tokenizer"
        )
    vocabulary = read_vocabulary(tokenizer)
    size = vocabulary.size if vocab_size is None else vocab_size
    if given is not None:
        return _checked(given, size)
    if isinstance(spec, str):
        found = _by_rule(spec, vocabulary)
    else:
        assert not isinstance(spec, TokenSeparators), "given as ids"
        found = TokenSeparators(tuple(_string_ids([str(item) for item in spec], vocabulary)))
    return _each(found, lambda ids: tuple(sorted(i for i in ids if i < size)))


def _each(
    found: TokenSeparators, change: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> TokenSeparators:
    return TokenSeparators(
        change(found.token_ids), change(found.line_breaks), change(found.closers)
    )


def _as_ids(spec: SeparatorSpec) -> TokenSeparators | None:
    """The ids if ``spec`` consists of ids, None if it is a rule or strings.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(spec, TokenSeparators):
        return spec
    if isinstance(spec, str):
        if spec in RULES:
            return None
    elif isinstance(spec, Sequence):
        kinds = {type(item) for item in spec}
        if kinds == {str}:
            return None
        # a bool is an int, but never meant as a token id
        if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
            return TokenSeparators(tuple(int(item) for item in spec))
    raise ValueError(
        f"separators must be one of {', '.join(map(repr, RULES))}, a list of strings or a list of "
        f"token ids, got {spec!r}; put a single string or id into a list, and do not mix the two"
    )


def _checked(given: TokenSeparators, vocab_size: int) -> TokenSeparators:
    return _each(given, lambda ids: _checked_ids(ids, vocab_size))


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


def _by_rule(rule: str, vocabulary: Vocabulary) -> TokenSeparators:
    """What the rule of this name selects."""

    def where(holds: Callable[[str], bool]) -> tuple[int, ...]:
        return tuple(token_id for token_id, text in vocabulary.text.items() if holds(text))

    boundaries = tuple(i for i, tag in vocabulary.control.items() if is_boundary(tag))
    if rule == "paper":
        found = TokenSeparators(where(paper_surfaces().__contains__))
    elif rule == "extended":
        found = TokenSeparators(where(closes_segment) + boundaries)
    elif rule == "unwrapped":
        found = TokenSeparators(
            where(_closes_unwrapped) + boundaries,
            where(lambda text: num_line_breaks(text) == 1 and is_closing(text)),
            where(_ends_line_or_segment) + boundaries,
        )
    else:
        found = TokenSeparators(
            where(ends_sentence) + boundaries,
            where(lambda text: num_line_breaks(text) == 1 and is_blank(text)),
            where(_ends_line),
        )
    if not found.token_ids:
        raise ValueError(
            f"separators={rule!r} must find a token in the tokenizer's vocabulary of "
            f"{vocabulary.size}, got none; give a list of token ids ([] for no separators)"
        )
    return found


def _closes_unwrapped(surface: str) -> bool:
    """Whether a token closes a segment without the help of a single line break at its end."""
    if num_line_breaks(surface) == 1:
        return closes_segment(surface.rstrip())
    return closes_segment(surface)


def _ends_line(surface: str) -> bool:
    """Whether the text ends with a line break; a CR at its end may be the first half of CR LF."""
    return num_line_breaks(surface) > 0 and not surface.endswith("\r")


def _ends_line_or_segment(surface: str) -> bool:
    """Whether a line break behind the text ends something.

    A blank is a separator in the extended rule, but ends nothing.
    """
    if num_line_breaks(surface):
        return _ends_line(surface)
    return closes_segment(surface) and not is_blank(surface)


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
