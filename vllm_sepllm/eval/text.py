"""Continuous text: perplexity, and how far a method's predictions are from full attention's.

Every excerpt is one request. Its second half is scored, where a query has read at least half of
the context, and where methods differ.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sepllm.eval.engine import Engine
from vllm_sepllm.eval.methods import Span
from vllm_sepllm.eval.store import Store
from vllm_sepllm.eval.task import Task


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


class Texts(Task):
    """Excerpts of one length."""

    kind = "text"

    def run(
        self, engine: Engine, items: Sequence[Excerpt], row: str, store: Store
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Score the excerpts; full attention's distributions are kept for the others."""
        for item in items:
            scores = engine.score(item.token_ids, item.positions)
            first = item.span.first
            answer: dict[str, Any] = {"nll": [-x for x in scores.logprobs[first:]]}
            answer["top_ids"] = scores.top_ids[first:]
            if row == self.full_row:
                store.write_array(row, item.name, scores.distributions.numpy())
            else:
                full = torch.from_numpy(store.read_array(self.full_row, item.name))
                answer["kl"] = divergences(full, scores.distributions)
            yield item.name, answer


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
    if room < least:
        raise ValueError(
            f"{name} has {len(token_ids):,} tokens, but {num_excerpts} excerpts of {length:,} are "
            f"wanted, which need {num_own + least:,}; give a longer text, a shorter context or "
            "fewer excerpts"
        )
    found = []
    for number in range(num_excerpts):
        start = room * (number + 1) // (num_excerpts + 1)
        ids = (*prefix, *token_ids[start : start + num_own])
        found.append(Excerpt(f"{name}-{number}", length, ids, num_positions))
    return found
