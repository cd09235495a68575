"""The authors' published separator lists on real tokenised text: which tokens, and what is visible.

Run as ``python -m examples.paper.published --text FILE --tokenizer llama-3=tokenizer.json``, for
``llama-3``, ``gpt-neox`` and ``qwen3``; the authors publish no list for Qwen, so what the paper's
rule derives stands for it. Tokenizers are not part of this package.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.policy.visibility import BoolArray, Policy, visible_mask

# ids of the authors' masks, then those that their cache adds
PUBLISHED = {
    "llama-3": (
        *(13, 11, 30, 0, 26, 25, 198, 220),
        *(662, 1174, 949, 758, 2652, 551, 720, 256, 262),
    ),
    "gpt-neox": (
        *(15, 13, 32, 2, 28, 27, 209, 186, 187),
        *(964, 1157, 3736, 2195, 3706, 1163, 2490, 50276, 586, 4928, 50275),
    ),
}
# initial tokens and windows of the paper's training-free runs and of its trained models
POLICIES = (Policy(3, 256), Policy(4, 252), Policy(3, 64))


@dataclass(frozen=True, slots=True)
class Line:
    """One tokenizer on the text.

    Attributes:
        name: of the list.
        num_tokens: of the text.
        num_ids: in the list; the paper's rule's own where there is none.
        share: of the tokens that are separators.
        only_published: surfaces that the paper's rule does not find.
        only_derived: surfaces that the list lacks.
        num_sets: visible sets that were compared, a set for each query and policy.
        num_different: of them, those that differ from M1's formula.
    """

    name: str
    num_tokens: int
    num_ids: int
    share: float
    only_published: tuple[str, ...]
    only_derived: tuple[str, ...]
    num_sets: int
    num_different: int


def formula(policy: Policy, is_separator: BoolArray) -> BoolArray:
    """The paper's mask, by design not the package's: [num_tokens, num_tokens], rows are queries."""
    i, j = np.ogrid[: len(is_separator), : len(is_separator)]
    near = (j < policy.initial_tokens) | (i - j < policy.window)
    visible: BoolArray = (j <= i) & (near | is_separator[None, :])
    return visible


def compare(name: str, tokenizer: Any, token_ids: Sequence[int]) -> Line:
    """Our visible sets beside the formula's, for every query and each of ``POLICIES``."""
    derived = token_separators("paper", tokenizer).token_ids
    ids = PUBLISHED.get(name, derived)
    size = len(tokenizer)
    # as the engine reads them
    separators = token_separators(list(ids), None, size)
    ours, theirs = separators.mask(token_ids), np.isin(token_ids, ids)
    num_different = sum(
        int((visible_mask(policy, ours) != formula(policy, theirs)).any(axis=1).sum())
        for policy in POLICIES
    )
    return Line(
        name,
        len(token_ids),
        len(ids),
        float(theirs.mean()),
        _surfaces(tokenizer, set(ids) - set(derived)),
        _surfaces(tokenizer, set(derived) - set(ids)),
        len(POLICIES) * len(token_ids),
        num_different,
    )


def _surfaces(tokenizer: Any, ids: set[int]) -> tuple[str, ...]:
    return tuple(tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in sorted(ids))


def markdown(lines: Sequence[Line]) -> str:
    """A table."""
    head = "| list | tokens | ids | separators | the paper's rule lacks | the list lacks |"
    found = [
        f"{head} visible sets that differ |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    for x in lines:
        lacks = " | ".join(
            ", ".join(f"`{surface!r}`" for surface in surfaces) or "nothing"
            for surfaces in (x.only_published, x.only_derived)
        )
        found.append(
            f"| {x.name} | {x.num_tokens:,} | {x.num_ids} | {x.share:.1%} | {lacks} | "
            f"{x.num_different} of {x.num_sets:,} |"
        )
    return "\n".join(found)


def main() -> None:
    """Print the table of 4,096 tokens from the middle of a text."""
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", action="append", required=True, metavar="NAME=FILE")
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    lines = []
    for given in args.tokenizer:
        name, _, file = given.partition("=")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = max(0, len(ids) // 2 - 2048)
        lines.append(compare(name, tokenizer, ids[start : start + 4096]))
    print(markdown(lines))


if __name__ == "__main__":
    main()
