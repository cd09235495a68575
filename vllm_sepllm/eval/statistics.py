"""Means with confidence intervals, for tokens that depend on their neighbours and for counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

_NUM_RESAMPLES = 2000
_Z = 1.959964  # of 95 %


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval; None, both, where the values allow none."""

    mean: float
    low: float | None
    high: float | None


def block_bootstrap(parts: Sequence[npt.ArrayLike], block: int) -> Estimate:
    """Mean of all values; whole blocks of neighbours are resampled, as they are not independent.

    Args:
        parts: one sequence of values per text, in the order of the text.
        block: values that stay together; the last block of a text may be shorter.

    Returns:
        No interval if there is one block alone, which says nothing of how blocks differ.
    """
    arrays = [np.asarray(part, dtype=np.float64) for part in parts]
    blocks = [a[i : i + block] for a in arrays for i in range(0, len(a), block)]
    sums = np.array([b.sum() for b in blocks])
    counts = np.array([len(b) for b in blocks])
    mean = float(sums.sum() / counts.sum())
    if len(blocks) == 1:
        return Estimate(mean, None, None)
    drawn = np.random.default_rng(0).integers(len(blocks), size=(_NUM_RESAMPLES, len(blocks)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def exponential(estimate: Estimate) -> Estimate:
    """Nats to perplexity, a difference of nats to a ratio."""
    low, high = (
        None if end is None else float(np.exp(end)) for end in (estimate.low, estimate.high)
    )
    return Estimate(float(np.exp(estimate.mean)), low, high)


def wilson(num_right: int, num: int) -> Estimate:
    """A share of few trials: Wilson's interval, which does not collapse at 0 and 1."""
    share = num_right / num
    centre = (share + _Z**2 / (2 * num)) / (1 + _Z**2 / num)
    half = _Z * sqrt(share * (1 - share) / num + _Z**2 / (4 * num**2)) / (1 + _Z**2 / num)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))
