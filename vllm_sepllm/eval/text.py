"""Continuous text: perplexity, and how far a method's predictions are from full attention's.

Every excerpt is one request. Its second half is scored, where a query has read at least half of
the context, and where methods differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sepllm.eval.engine import Engine, running
from vllm_sepllm.eval.methods import FULL, Span
from vllm_sepllm.eval.store import Store


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One request's tokens.

    Attributes:
        name: of the text and the excerpt.
        length: context that it fills, one token left for the answer that vLLM insists on.
        token_ids: [length - 1], BOS first if the tokenizer has one.
        num_positions: queries whose whole distribution is compared.
    """

    name: str
    length: int
    token_ids: tuple[int, ...]
    num_positions: int

    suite = "text"
    opened = staticmethod(running)

    @property
    def span(self) -> Span:
        """The scored queries."""
        return Span(self.token_ids, self.length // 2 - 1)

    @property
    def positions(self) -> list[int]:
        """Queries whose distribution is compared, evenly over the scored ones."""
        last = len(self.token_ids) - 2
        spread = np.linspace(self.span.first, last, self.num_positions)
        return sorted(set(np.round(spread).astype(int).tolist()))

    @property
    def spans(self) -> list[Span]:
        """Those of the item's requests."""
        return [self.span]

    def run(self, engine: Engine, method: str, store: Store) -> dict[str, Any]:
        """Score the excerpt; full attention's distributions are kept for the others."""
        scores = engine.score(self.token_ids, self.positions)
        first = self.span.first
        cell: dict[str, Any] = {"nll": [-x for x in scores.logprobs[first:]]}
        cell["top_ids"] = scores.top_ids[first:]
        key = cell_key(self, FULL)
        if method == FULL:
            store.write_array(key, scores.distributions.numpy())
        else:
            full = torch.from_numpy(store.read_array(key))
            cell["kl"] = divergences(full, scores.distributions)
        return cell


def cell_key(item: Any, method: str) -> str:
    """Where the cell of an item and a method is stored."""
    return f"{row_key(item.suite, item.length, method)}/{item.name}"


def row_key(suite: str, length: int, method: str) -> str:
    """Where all cells of a row of the report are stored."""
    return f"{suite}/{length}/{method}"


def divergences(full: torch.Tensor, other: torch.Tensor) -> list[float]:
    """KL(full || other) in nats, from log-probabilities: [num_positions, vocab] x 2 -> list."""
    # a probability of exactly 0 adds nothing
    terms = torch.where(full == float("-inf"), 0.0, full.exp() * (full - other))
    values: list[float] = terms.sum(dim=-1).clamp(min=0.0).tolist()
    return values


def excerpts(
    name: str,
    token_ids: Sequence[int],
    prefix: Sequence[int],
    *,
    length: int,
    num_excerpts: int,
    num_positions: int,
) -> list[Excerpt]:
    """Excerpts of one context length, evenly over a text, not from its title page.

    Args:
        name: of the text.
        token_ids: of the whole text, without special tokens.
        prefix: special tokens that the tokenizer puts in front.
        length: context.
        num_excerpts: how many.
        num_positions: see Excerpt.

    Raises:
        ValueError: if the text is too short for scored halves that do not overlap.
    """
    num_own = length - 1 - len(prefix)
    room = len(token_ids) - num_own
    # a token that two excerpts score would count twice, and narrow the intervals
    least = (num_excerpts + 1) * (length // 2) if num_excerpts > 1 else 0
    if num_excerpts and room < least:
        raise ValueError(
            f"{name} has {len(token_ids):,} tokens, but {num_excerpts} excerpts of {length:,} are "
            f"wanted, which need {num_own + least:,}; give a longer text, a shorter --context or "
            "fewer --excerpts"
        )
    found = []
    for number in range(num_excerpts):
        start = room * (number + 1) // (num_excerpts + 1)
        ids = (*prefix, *token_ids[start : start + num_own])
        found.append(Excerpt(f"{name}-{number}", length, ids, num_positions))
    return found
