"""The suites: what each measures, on all sides in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.console import Console

from vllm_sepllm.bench.results import Results
from vllm_sepllm.bench.sides import SideProcess

Sides = dict[str, SideProcess]
GATE_TOKENS = 64  # prompt tokens of the gate: below initial_tokens + window, all sides are alike


@dataclass(frozen=True, slots=True)
class Work:
    """What the suites run.

    Attributes:
        text: token ids of real text; prompts are cut from it.
        lengths: prompt tokens, one case each.
        batches: requests at once, one case each where a suite batches.
        max_tokens: tokens of an answer.
        rounds: samples of each case on each side.
        kv_tokens: KV cache in tokens of full attention, the same bytes on all sides; None: enough
            for all requests at once.
    """

    text: list[int]
    lengths: list[int]
    batches: list[int]
    max_tokens: int
    rounds: int
    kv_tokens: int | None = None

    def prompt(self, number: int, length: int) -> list[int]:
        """A piece of the text; other numbers start elsewhere, wrapping around."""
        first = number * 997 % len(self.text)
        ids = self.text[first:] + self.text[:first]
        return (ids * (length // len(ids) + 1))[:length]

    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.lengths) + self.max_tokens

    def holds_in_full(self, length: int, batch: int) -> bool:
        """Whether full attention's KV of so many requests fits at once."""
        return self.kv_tokens is None or batch * (length + self.max_tokens) <= self.kv_tokens


def gate(sides: Sides, work: Work) -> None:
    """Short greedy answers are the same on all sides.

    Raises:
        RuntimeError: if not: no time is worth anything then.
    """
    prompts = [work.prompt(i, GATE_TOKENS) for i in range(2)]
    answers = {n: s.do("generate", prompts=prompts, max_tokens=16) for n, s in sides.items()}
    tokens = {name: answer["token_ids"] for name, answer in answers.items()}
    if any(found != next(iter(tokens.values())) for found in tokens.values()):
        raise RuntimeError(f"the sides answer a short prompt differently: {tokens}")


def ttft(sides: Sides, work: Work, results: Results) -> None:
    """Time to the first token of a lone request."""
    for length in work.lengths:
        for number in range(work.rounds):
            prompt = work.prompt(number, length)
            for name, side in sides.items():
                seconds = side.do("generate", prompts=[prompt], max_tokens=1)["seconds"]
                results.add(f"{length} tokens", name, ttft_s=seconds)


def decode(sides: Sides, work: Work, results: Results) -> None:
    """Time per output token, and of stock vLLM at sepllm's compact length: the limit.

    Also of stock vLLM behind a few tokens: what is left of a step without attention. With prefix
    caching on, the prompts are computed once and each round decodes anew. Where the KV budget does
    not hold all prompts in full, stock vLLM has no time of its own: they would not decode at once.
    """
    for length in work.lengths:
        for batch in work.batches:
            case = f"{length} tokens, batch {batch}"
            prompts = [work.prompt(number, length) for number in range(batch)]
            others = _others(sides, prompts)
            whole = dict(sides)
            if "stock" in whole and not work.holds_in_full(length, batch):
                del whole["stock"]
                said = f"{case}: stock vLLM left out, the KV budget does not hold its requests"
                Console(stderr=True).print(said, highlight=False)
            for number in range(work.rounds + 1):
                measured = {name: _per_token(side, prompts, work) for name, side in whole.items()}
                for name, cut in others.items():
                    measured[name] = _per_token(sides["stock"], cut, work)
                if number:  # the first fills the prefix caches
                    for name, seconds in measured.items():
                        results.add(case, name, time_per_token_s=seconds)


def _others(sides: Sides, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """Shorter prompts for stock vLLM, by what its decoding at them stands for."""
    if "stock" not in sides:
        return {}
    found = {f"stock at {GATE_TOKENS} tokens": [p[:GATE_TOKENS] for p in prompts]}
    compact = sides.get("sepllm", sides.get("extended"))
    if compact is not None:
        found["stock at the compact length"] = [
            p[: compact.do("compact_length", prompt=p)] for p in prompts
        ]
    return found


def _per_token(side: SideProcess, prompts: list[list[int]], work: Work) -> float:
    """Seconds between tokens while all requests decode, from vLLM's own time stamps."""
    requests = side.do("generate", prompts=prompts, max_tokens=work.max_tokens)["requests"]
    first = max(r["first_token_ts"] for r in requests)
    last = max(r["last_token_ts"] for r in requests)
    return float(last - first) / (work.max_tokens - 1)


def concurrency(sides: Sides, work: Work, results: Results) -> None:
    """Many long requests in one small KV budget: throughput, queue, and how many at once."""
    for length in work.lengths:
        for batch in work.batches:
            prompts = [work.prompt(number, length) for number in range(batch)]
            for _ in range(work.rounds):
                for name, side in sides.items():
                    answer = side.do("generate", prompts=prompts, max_tokens=work.max_tokens)
                    results.add(f"{batch} of {length}", name, **_serving(answer, length))


def _serving(answer: dict[str, Any], length: int) -> dict[str, float]:
    requests, seconds = answer["requests"], answer["seconds"]
    num_tokens = sum(len(ids) for ids in answer["token_ids"])
    return {
        "output_tokens_per_s": num_tokens / seconds,
        "all_tokens_per_s": (num_tokens + length * len(requests)) / seconds,
        "mean_queue_s": fmean(r["scheduled_ts"] - r["queued_ts"] for r in requests),
        "mean_latency_s": fmean(r["last_token_ts"] - r["queued_ts"] for r in requests),
        "decoding_at_once": _overlap([(r["first_token_ts"], r["last_token_ts"]) for r in requests]),
    }


def _overlap(spans: list[tuple[float, float]]) -> int:
    """Most of the spans that are open at the same time."""
    events = sorted([(first, 1) for first, _ in spans] + [(last, -1) for _, last in spans])
    most = now = 0
    for (at, step), (following, _) in pairwise([*events, (float("inf"), 0)]):
        now += step
        if following > at:
            most = max(most, now)
    return most


def overhead(sides: Sides, work: Work, results: Results) -> None:
    """Short requests, which behave as without sepllm: throughput and latency."""
    for length in work.lengths:
        for batch in work.batches:
            prompts = [work.prompt(number, length) for number in range(batch)]
            for _ in range(work.rounds):
                for name, side in sides.items():
                    answer = side.do("generate", prompts=prompts, max_tokens=work.max_tokens)
                    served = _serving(answer, length)
                    kept = ("output_tokens_per_s", "mean_latency_s")
                    results.add(f"{batch} of {length}", name, **{k: served[k] for k in kept})


def prefix(sides: Sides, work: Work, results: Results) -> None:
    """The second question about a document: its prefix is cached."""
    for length in work.lengths:
        for number in range(work.rounds):
            document = work.prompt(number, length)
            asked = [document + work.prompt(1000 + i, 32) for i in range(2)]
            for name, side in sides.items():
                cold, warm = (
                    side.do("generate", prompts=[prompt], max_tokens=1)["seconds"]
                    for prompt in asked
                )
                results.add(f"{length} tokens", name, first_ttft_s=cold, second_ttft_s=warm)


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite and what it runs unless told otherwise.

    Attributes:
        run: the suite.
        lengths: defaults of :class:`Work`.
        batches: the same; None: it sends one request at a time.
        max_tokens: the same; None: it asks for the first token only.
        caching: whether prefix caching is on.
        kv_tokens: the same.
    """

    run: Callable[[Sides, Work, Results], None]
    lengths: tuple[int, ...]
    batches: tuple[int, ...] | None = None
    max_tokens: int | None = None
    caching: bool = False
    kv_tokens: int | None = None

    def work(
        self,
        text: list[int],
        lengths: list[int] | None,
        batches: list[int] | None,
        max_tokens: int | None,
        rounds: int,
        kv_tokens: int | None = None,
    ) -> Work:
        """What to run; None: the suite's own.

        Raises:
            ValueError: for what the suite does not use, or cannot measure with.
        """
        if batches and self.batches is None:
            raise ValueError("--batch: this suite sends one request at a time; leave it out")
        if max_tokens and self.max_tokens is None:
            raise ValueError("--max-tokens: this suite times the first token only; leave it out")
        if max_tokens is not None and max_tokens < 2:
            raise ValueError("--max-tokens must be 2 or more: time is taken between tokens")
        return Work(
            text=text,
            lengths=lengths or list(self.lengths),
            batches=batches or list(self.batches or (1,)),
            max_tokens=max_tokens or self.max_tokens or 1,
            rounds=rounds,
            kv_tokens=kv_tokens or self.kv_tokens,
        )


SUITES = {
    "ttft": Suite(ttft, (1024, 8192, 32768)),
    "decode": Suite(decode, (8192, 16384, 32768), (1, 16), 64, caching=True),
    "concurrency": Suite(concurrency, (8192,), (32,), 128, kv_tokens=4 * 8192),
    "overhead": Suite(overhead, (128,), (16,), 64),
    "prefix": Suite(prefix, (8192,), caching=True),
}
