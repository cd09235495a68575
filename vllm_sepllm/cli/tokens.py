"""A model's tokenizer, and a text as the tokens that the model would see."""

from dataclasses import dataclass
from typing import Any

import typer

from vllm_sepllm.cli.unreadable import unreadable
from vllm_sepllm.policy.separators.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True, slots=True)
class TokenisedText:
    """Tokens of one text.

    Attributes:
        ids: token ids, with the special tokens that the tokenizer adds (BOS).
        pieces: the text that each token covers; joined, the text, apart from special tokens.
            A token that holds only a later part of a character has "".
    """

    ids: list[int]
    pieces: list[str]


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model folder or of a name in the Hugging Face cache.

    Raises:
        typer.BadParameter: if there is none.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # a text longer than the model's context is no mistake here
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = unreadable(model, "config.json", "tokenizer_config.json")
        reason = reason or " ".join(str(error).split())
        raise typer.BadParameter(f"no tokenizer in {model!r}: {reason}") from None


def tokenise(tokenizer: Any, text: str) -> TokenisedText:
    """The tokens of ``text``; ``tokenizer`` is what :func:`load_tokenizer` returned."""
    vocabulary = read_vocabulary(tokenizer)
    if not tokenizer.is_fast:  # no offsets, so the vocabulary must tell
        ids = list(tokenizer(text)["input_ids"])
        return TokenisedText(ids, [_surface(vocabulary, token_id) for token_id in ids])
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, pieces, done = list(encoded["input_ids"]), [], 0
    for token_id, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
        if start == end and token_id in vocabulary.control:
            pieces.append(vocabulary.control[token_id])
            continue
        # from where the last token ended: what a tokenizer drops is shown with the next token
        pieces.append(text[done:end])
        done = max(done, end)
    if pieces and done < len(text):
        pieces[-1] += text[done:]
    return TokenisedText(ids, pieces)


def _surface(vocabulary: Vocabulary, token_id: int) -> str:
    known = vocabulary.text.get(token_id) or vocabulary.control.get(token_id)
    return known or "\N{REPLACEMENT CHARACTER}"
