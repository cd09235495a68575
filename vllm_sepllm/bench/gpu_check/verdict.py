"""The verdict on a stage: sepllm may be as far from its oracle as stock vLLM is from its own."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm_sepllm.bench.gpu_check.oracle import Scores

MEAN_FACTOR, LARGEST_FACTOR = 2.0, 4.0  # the largest of some hundred errors scatters more
ATOL = 1e-3  # float32: what is left is the order of sums


@dataclass(frozen=True, slots=True)
class Errors:
    """Differences of log-probabilities between an engine and the oracle.

    Attributes:
        mean: of the absolute differences.
        largest: of them.
        gap: most by which the oracle prefers another token to the engine's choice.
        num_other: tokens that the oracle would have chosen otherwise.
        num_tokens: of all answers.
    """

    mean: float
    largest: float
    gap: float
    num_other: int
    num_tokens: int


def errors_of(answers: Iterable[tuple[list[float], Scores]]) -> Errors:
    """Of the log-probabilities that an engine gave, and the oracle's of the same tokens.

    An engine that gives no number is infinitely wrong.
    """
    pairs = list(answers)
    given = torch.cat([torch.tensor(logprobs) for logprobs, _ in pairs])
    own = torch.cat([scores.own for _, scores in pairs])
    gap = torch.cat([scores.best for _, scores in pairs]) - own
    away = (given - own).abs().nan_to_num(nan=float("inf"))
    return Errors(
        mean=away.mean().item(),
        largest=away.max().item(),
        gap=gap.max().item(),
        num_other=int((gap > 0).sum()),
        num_tokens=len(own),
    )


def faults_of(stock: Errors, sepllm: Errors, control: Errors) -> list[str]:
    """What is wrong, a line each.

    Args:
        stock: stock vLLM against full attention: what the dtype costs.
        sepllm: sepllm against its rule.
        control: sepllm against full attention, or against the rule without what the stage is
            about: what an engine would show that did nothing.
    """
    mean = MEAN_FACTOR * stock.mean + ATOL
    largest = LARGEST_FACTOR * stock.largest + ATOL
    faults = []
    for name, found, limit in (
        ("mean error", sepllm.mean, mean),
        ("largest error", sepllm.largest, largest),
        # of two tokens, each as wrong as one may be
        ("lead of another token", sepllm.gap, 2 * largest),
    ):
        if not found <= limit:
            faults.append(f"{name} {found:.3g} is more than {limit:.3g} (from stock vLLM's)")
    if not control.mean > mean:
        faults.append(
            f"the check is blind: an engine that did nothing would be as near "
            f"({control.mean:.3g}) as stock vLLM's errors allow ({mean:.3g})"
        )
    return faults
