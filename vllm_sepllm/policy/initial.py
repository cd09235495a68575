"""How many tokens at the start of a request every query reads: a fixed number, or a whole prefix.

In a chat and for an agent the system prompt and the tool schemas must not be forgotten. They end
with a control token of the chat template, so where they end is seen in the prompt's token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sepllm.policy.separators.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True, slots=True)
class Initial:
    """``least`` tokens, or all up to and including the first occurrence of a token in the prompt.

    Attributes:
        least: tokens of a prompt without a protected prefix, and the fewest that a request has.
        end_id: the token that ends a protected prefix; None: no prefix is protected.
        max_tokens: most tokens that are protected; a prompt without ``end_id`` among its first
            ``max_tokens`` tokens has no protected prefix.
    """

    least: int
    end_id: int | None = None
    max_tokens: int = 0

    @property
    def most(self) -> int:
        """The most that a request can have."""
        return max(self.max_tokens, self.least)

    def is_in(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt has the prefix that is to be protected, if any is."""
        return self.end_id is None or self.end_id in prompt[: self.max_tokens]

    def of(self, prompt: Sequence[int]) -> int:
        """The number of a request with this prompt."""
        if self.end_id is None or not self.is_in(prompt):
            return self.least
        return max(self.least, prompt[: self.max_tokens].index(self.end_id) + 1)


def protected_end(given: str | int, tokenizer: Any, vocab_size: int) -> int:
    """The token that ends a protected prefix, of a tokenizer; None, without one, will do for an id.

    Raises:
        ValueError: if there is no such token, naming those that would do.
    """
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer)
    templates = getattr(tokenizer, "chat_template", None) or ""
    # one text, or several by the names of their uses
    template = templates if isinstance(templates, str) else "\n".join(templates.values())
    return end_token_id(given, vocabulary, vocab_size, template)


def end_token_id(
    given: str | int, vocabulary: Vocabulary | None, vocab_size: int, chat_template: str
) -> int:
    """The token that ends a protected prefix.

    Args:
        given: the token's text or its id.
        vocabulary: of the model's tokenizer; None will do for an id.
        vocab_size: of the model.
        chat_template: of the tokenizer, in which candidates are looked for.

    Raises:
        ValueError: if there is no such token, naming those that would do.
    """
    if isinstance(given, int):
        if not 0 <= given < vocab_size:
            raise ValueError(
                f"protect must be a token id in [0, {vocab_size}), the vocabulary, got {given}"
            )
        return given
    if vocabulary is None:
        raise ValueError(
            f"protect={given!r} must be read from a tokenizer, got none; give the token's id, or "
            "serve with a tokenizer"
        )
    surfaces = vocabulary.text | vocabulary.control
    found = [i for i, surface in surfaces.items() if surface == given and i < vocab_size]
    if not found:
        named = sorted({tag for tag in vocabulary.control.values() if tag and tag in chat_template})
        advice = (
            f"its chat template has {', '.join(map(repr, named))}"
            if named
            else "its chat template has no control token; leave protect out"
        )
        raise ValueError(
            f"protect must be the text of one token of the model's tokenizer, such as the control "
            f"token that ends a system prompt, got {given!r}; {advice}"
        )
    return min(found)
