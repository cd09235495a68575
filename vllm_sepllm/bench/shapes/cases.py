"""Cases: what is measured in which order, how long it may take, and what a cost model says."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vllm_sepllm.bench.gpus import Gpu
from vllm_sepllm.bench.roofline import (
    DENSITY,
    POLICY,
    Transformer,
    decode_cost,
    num_keys,
    prefill_cost,
)
from vllm_sepllm.bench.shapes.shape import KV_SLACK
from vllm_sepllm.bench.suites import GATE_TOKENS

MAX_TOKENS = 64  # of an answer
MOST_DECODING = 16
LEAST_WAITING = 3  # requests of `concurrency` where hardly more than one fits
PESSIMISM = 4.0  # times the bound of a case that was not yet measured


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement on both sides.

    Attributes:
        suite: "ttft", "decode" or "concurrency".
        length: prompt tokens.
        batch: requests at once.
    """

    suite: str
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.suite}, {self.batch} of {self.length} tokens"


def cases_of(lengths: Iterable[int], suites: Iterable[str]) -> list[Case]:
    """Cases for a KV cache that holds the longest prompt once, short ones first.

    Decoding: one request, and as many as the cache holds in full. Concurrency: twice as many.
    """
    ordered, wanted = sorted(lengths), set(suites)
    found = []
    for length in ordered:
        at_once = min(MOST_DECODING, ordered[-1] // length)
        waiting = max(LEAST_WAITING, 2 * (ordered[-1] // length))
        found.append(Case("ttft", length, 1))
        found += [Case("decode", length, batch) for batch in sorted({1, at_once})]
        found.append(Case("concurrency", length, waiting))
    return [case for case in found if case.suite in wanted]


def predicted(case: Case, side: str, sizes: Transformer, gpu: Gpu, longest: int) -> float | None:
    """The roofline's bound of the suite's main measure, in its unit; None: no model of this side.

    Seconds for ``ttft`` and ``decode``, output tokens a second for ``concurrency``.
    """
    policy = POLICY if side == "sepllm" else None
    context = case.length + MAX_TOKENS // 2
    if side == "stock at the compact length":
        context = round(num_keys(case.length - 1, POLICY, DENSITY))
    elif side == f"stock at {GATE_TOKENS} tokens":
        context = GATE_TOKENS
    elif side not in ("stock", "sepllm"):
        return None
    if case.suite == "decode":
        return decode_cost(sizes, gpu, 1, context, case.batch, policy, DENSITY).bound_ms / 1e3
    first = prefill_cost(sizes, gpu, 1, case.length, policy, DENSITY).bound_ms / 1e3
    if case.suite == "ttft":
        return first
    at_once = min(case.batch, int((longest + KV_SLACK) // num_keys(context, policy, DENSITY)))
    step = decode_cost(sizes, gpu, 1, context, at_once, policy, DENSITY).bound_ms / 1e3
    steps = math.ceil(case.batch / at_once) * MAX_TOKENS
    return case.batch * MAX_TOKENS / (case.batch * first + steps * step)


def expected_seconds(case: Case, sizes: Transformer, gpu: Gpu | None, longest: int) -> float:
    """A guess at what both sides need for a case that was not yet measured; 0 without a model."""
    if gpu is None:
        return 0.0
    total = 0.0
    for side in ("stock", "sepllm"):
        found = predicted(case, side, sizes, gpu, longest)
        assert found is not None, "both sides have a model"
        if case.suite == "ttft":
            total += found
        elif case.suite == "concurrency":
            total += case.batch * MAX_TOKENS / found
        else:  # prompts once, answers twice
            prompt = predicted(Case("ttft", case.length, 1), side, sizes, gpu, longest)
            total += case.batch * (prompt or 0.0) + 2 * MAX_TOKENS * found
    return PESSIMISM * total


class Budget:
    """Seconds that are left of those given, by ``clock``."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds, 0 at least."""
        return max(0.0, self._end - self._clock())


@dataclass(frozen=True, slots=True)
class Step:
    """One round of one case."""

    case: Case
    round: int


def steps_of(cases: list[Case], rounds: int) -> Iterator[Step]:
    """Every case once before any a second time."""
    for number in range(rounds):
        for case in cases:
            yield Step(case, number)


def run_within(
    steps: Iterable[Step],
    seconds: dict[Step, float],
    guess: Callable[[Case], float],
    budget: Budget,
    run: Callable[[Step], float],
) -> list[tuple[Step, str]]:
    """Run steps as long as there is time for them; return those left out, with the reason.

    A step is not begun if the case's last round would not fit what is left, or, before the first
    round, a guess. A shorter one behind it may still fit.

    Args:
        steps: in their order.
        seconds: of steps that an earlier run has finished; what ``run`` returns is added.
        guess: seconds of a case that has no round yet.
        budget: what is left.
        run: measures a step; returns its seconds.
    """
    left_out = []
    for step in steps:
        if step in seconds:
            continue
        before = [taken for done, taken in seconds.items() if done.case == step.case]
        needed, left = before[-1] if before else guess(step.case), budget.left()
        if left <= needed:
            left_out.append((step, f"needs about {needed:.0f} s, {left:.0f} s were left"))
            continue
        seconds[step] = run(step)
    return left_out
