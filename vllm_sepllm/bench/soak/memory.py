"""Resident memory of a server over time, and whether it grows."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import linear_regression

import psutil

MIN_SAMPLES = 8
# Share of the run in which buffers grow to the largest batch, and allocators with them.
WARM_UP = 0.25
# Bound of the growth after the warm-up, as a share of the memory then. At rest a server's memory
# wavers by one or two percent, because allocators keep some of what a new batch shape needed; five
# percent are some 50 MiB, which a leak of 20 KiB a request reaches within 2,500 requests.
MAX_GROWTH = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident memory of all processes, ``minutes`` after the start, with nothing running."""

    minutes: float
    mib: float


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through the samples after the warm-up.

    Attributes:
        mib_per_minute: its slope.
        growth: what it rises in that time, as a share of where it begins.
    """

    mib_per_minute: float
    growth: float

    @property
    def is_level(self) -> bool:
        """Whether it stays within the bound."""
        return self.growth <= MAX_GROWTH


def trend(samples: Sequence[Sample]) -> Trend | None:
    """The trend; None with too few samples to tell."""
    if len(samples) < MIN_SAMPLES:
        return None
    settled = samples[round(len(samples) * WARM_UP) :]
    minutes = [s.minutes for s in settled]
    slope, level = linear_regression(minutes, [s.mib for s in settled])
    begin = level + slope * minutes[0]
    return Trend(round(slope, 3), round(slope * (minutes[-1] - minutes[0]) / begin, 4))


def descendants_rss_mib() -> float:
    """Resident memory of all processes below this one."""
    total: int = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended
            total += process.memory_info().rss
    return total / 2**20
