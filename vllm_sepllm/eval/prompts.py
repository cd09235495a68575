"""Prompts that fill a context: as much of a text as fits around what is asked."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a chat, up to where the model answers."""
    chat = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # the template has written the special tokens already
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])


def filled(
    prompt: Callable[[str], Sequence[int]], text: str, length: int, num_answer: int, slack: int
) -> tuple[int, ...]:
    """The longest prompt that leaves room for an answer, in whole characters of a text.

    Args:
        prompt: token ids of the prompt around a beginning of the text.
        text: what the context is filled with.
        length: context, in tokens.
        num_answer: tokens of it that are left to the answer.
        slack: tokens by which one more character may lengthen a prompt.

    Raises:
        ValueError: if the text does not fill the context, or the context holds no text.
    """
    limit = length - num_answer
    low, high = 0, min(len(text), 8 * limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(prompt(text[:middle])) <= limit else (low, middle - 1)
    ids = tuple(prompt(text[:low]))
    if len(ids) > limit:
        raise ValueError(
            f"a context of {length:,} tokens holds no text: the question takes {len(ids):,} tokens "
            f"and the answer {num_answer}; give a longer context"
        )
    if len(ids) < limit - slack:
        raise ValueError(
            f"prompts of {length:,} tokens need more text: behind its random start a text fills "
            f"{len(ids):,} tokens of {limit:,}; give a longer text or a shorter context"
        )
    return ids
