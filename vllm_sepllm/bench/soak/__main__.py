"""Random traffic against ``vllm serve --attention-backend sepllm``: what is lost, wrong or leaks.

``python -m vllm_sepllm.bench.soak --model FOLDER --minutes N``. In rounds: peers send random
requests (lengths, priorities, shared prefixes, conversations, disconnects, aborts, invalid input,
bursts beyond the pool), then every finished answer is asked for again, alone and past the prefix
cache, and must be the same, and a prompt that is sent twice must be found in the prefix cache.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import httpx
from rich.console import Console
from rich.table import Table

from vllm_sepllm.bench.soak.client import MODEL_NAME, Client, Request, ServerFault, verdict
from vllm_sepllm.bench.soak.load import INJECTED, MAX_MODEL_LEN, Traffic
from vllm_sepllm.bench.soak.memory import MAX_GROWTH, Sample, Trend, descendants_rss_mib, trend
from vllm_sepllm.processes import serving

START_SECONDS = 300.0
ROUND_SECONDS = 15.0
NUM_SEPARATORS = 64
# a + n + s = 320 entries are 10 blocks of 32, full attention of the longest request is 64: a burst
# needs more than there are, and between bursts there is room for the prefix cache
NUM_BLOCKS = 80
POLICY = {"initial_tokens": 4, "window": 60, "max_separators": 256}
# field of the report -> vLLM's counter
COUNTERS = {
    "num_preemptions": "vllm:num_preemptions_total",
    "num_prompt_tokens": "vllm:prompt_tokens_total",
    "num_cached_tokens": "vllm:prefix_cache_hits_total",
    "num_new_tokens": "vllm:generation_tokens_total",
}


@dataclass(slots=True)
class Report:
    """What a soak run found.

    Attributes:
        sent: kind of request -> number; a burst counts once. Some kinds are faults on purpose
            (soak_load.INJECTED).
        requests: sent to the server, replays included.
        most_at_once: of them in flight together.
        answered: to their end.
        lost: whose answer broke off or never came, and which were not meant to.
        replayed: finished answers, each compared with a second one.
        near_ties: replays that part where the best two tokens are closer than float32 noise.
        wrong: replays that differ otherwise.
        faults: errors where there must be none, missing ones, and what was lost, one line each.
        num_preemptions, num_prompt_tokens, num_cached_tokens, num_new_tokens: from /metrics.
        kv_cache_usage: highest of the pauses between rounds, when nothing runs.
        num_blocks, free_blocks: of the pool, and at the end.
        memory: resident memory of the server's processes after each round.
        trend: of it; None with too few rounds to tell.
    """

    model: str
    versions: dict[str, str]
    minutes: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    most_at_once: int = 0
    answered: int = 0
    lost: int = 0
    replayed: int = 0
    near_ties: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    kv_cache_usage: float = 0.0
    num_blocks: int = 0
    free_blocks: int = 0
    memory: list[Sample] = field(default_factory=list)
    trend: Trend | None = None

    @property
    def is_good(self) -> bool:
        """No fault, nothing lost or wrong, every block free, memory level."""
        is_level = self.trend is None or self.trend.is_level
        are_blocks_free = self.kv_cache_usage == 0 and self.free_blocks == self.num_blocks
        is_whole = not self.faults and not self.lost and not self.wrong
        return is_whole and are_blocks_free and is_level


def metrics_page(base_url: str) -> str:
    """What /metrics says."""
    opener = build_opener(ProxyHandler({}))
    with opener.open(base_url.removesuffix("/v1") + "/metrics", timeout=60) as page:
        return str(page.read().decode())


def metric_of(page: str, name: str) -> float:
    """A gauge or counter of a page, summed over its labels.

    Raises:
        RuntimeError: if there is none of that name.
    """
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
    if not values:
        raise RuntimeError(f"/metrics has no {name}")
    return sum(map(float, values))


def metric(base_url: str, name: str) -> float:
    """A gauge or counter as it is now."""
    return metric_of(metrics_page(base_url), name)


async def run(
    base_url: str, vocab_size: int, separators: list[int], seed: int, report: Report, seconds: float
) -> None:
    """Rounds of traffic and replays for about ``seconds``; fills ``report``."""
    client = Client(base_url)
    traffic = Traffic(client, vocab_size, separators, seed)
    start = time.monotonic()
    end = start + seconds
    while (left := end - time.monotonic()) > 0:
        await traffic.run(min(ROUND_SECONDS, left / 2))
        await _check_idle(base_url, report)
        await _replay(client, traffic, report)
        await _check_cache(base_url, client, traffic.long_request(), report)
        await _check_idle(base_url, report)
        minutes = (time.monotonic() - start) / 60
        report.memory.append(Sample(round(minutes, 2), round(descendants_rss_mib(), 1)))
        print(
            f"  {max(0.0, end - time.monotonic()):.0f} s left, {report.replayed} replayed, "
            f"{len(report.faults) + len(traffic.tally.faults)} faults, {report.wrong} wrong, "
            f"{report.memory[-1].mib:.0f} MiB",
            flush=True,
        )
    await client.close()
    report.sent = dict(sorted(traffic.tally.sent.items()))
    report.faults += traffic.tally.faults
    report.lost += traffic.tally.lost
    report.requests, report.answered = client.num_sent, client.num_answered
    report.most_at_once = client.most_at_once
    report.num_blocks = NUM_BLOCKS - 1  # vLLM never gives out its first one
    used = metric(base_url, "vllm:kv_cache_usage_perc")
    report.free_blocks = round(report.num_blocks * (1 - used))


async def _replay(client: Client, traffic: Traffic, report: Report) -> None:
    """Ask again for what finished, one request at a time, nothing of it cached."""
    for request, answer in traffic.tally.finished:
        try:
            again = await client.ask(request, salt=client.fresh_salt())
        except (ServerFault, httpx.HTTPError) as error:
            report.lost += 1
            report.faults.append(f"replay: {type(error).__name__} {error}")
            continue
        found = verdict(answer, again)
        report.replayed += 1
        report.near_ties += found == "near tie"
        report.wrong += found == "wrong"
    traffic.tally.finished.clear()


async def _check_cache(base_url: str, client: Client, request: Request, report: Report) -> None:
    """Whatever the traffic did to it, the prefix cache still finds what was just there."""
    try:
        await client.ask(request)
        before = metric(base_url, COUNTERS["num_cached_tokens"])
        await client.ask(request)
    except (ServerFault, httpx.HTTPError) as error:
        report.lost += 1
        report.faults.append(f"prefix cache: {type(error).__name__} {error}")
        return
    found = metric(base_url, COUNTERS["num_cached_tokens"]) - before
    if found < len(request.prompt) // 2:
        report.faults.append(f"prefix cache: {found:.0f} of {len(request.prompt)} tokens found")


async def _check_idle(base_url: str, report: Report) -> None:
    """Aborted requests leave within a step or two; then no block may be held."""
    usage = running = 1.0
    for _ in range(100):
        running = metric(base_url, "vllm:num_requests_running")
        running += metric(base_url, "vllm:num_requests_waiting")
        usage = metric(base_url, "vllm:kv_cache_usage_perc")
        if running == usage == 0:
            return
        await asyncio.sleep(0.1)
    report.kv_cache_usage = max(report.kv_cache_usage, usage)
    report.faults.append(f"idle for 10 s: {running:.0f} requests, {usage:.2%} of the blocks held")


def serve_command(model: Path, separators: list[int]) -> list[str]:
    """A server whose pool holds less than a burst with full attention in it."""
    config = {"sepllm": POLICY | {"separators": separators}}
    command = ["vllm", "serve", str(model), "--served-model-name", MODEL_NAME]
    command += ["--attention-backend", "sepllm", "--additional-config", json.dumps(config)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--max-num-seqs", "16", "--max-num-batched-tokens", "256"]
    command += ["--scheduling-policy", "priority"]
    command += ["--kv-cache-memory-bytes", str(1 << 28)]
    return [*command, "--num-gpu-blocks-override", str(NUM_BLOCKS)]


def soak(model: Path, minutes: float, seed: int) -> Report:
    """Start the server, run, stop it.

    Raises:
        RuntimeError: if the server does not start, ends by itself or does not stop.
    """
    vocab_size = int(json.loads((model / "config.json").read_text())["vocab_size"])
    separators = sorted(random.Random(seed).sample(range(vocab_size), NUM_SEPARATORS))
    report = Report(str(model), {name: version(name) for name in ("vllm", "vllm-sepllm", "torch")})
    log = Path(tempfile.mkdtemp(prefix="vllm-sepllm-soak-")) / "server.log"
    print(f"  the server's log is {log}", flush=True)
    with serving(serve_command(model, separators), log, START_SECONDS) as base_url:
        start = time.monotonic()
        try:
            asyncio.run(run(base_url, vocab_size, separators, seed, report, 60 * minutes))
            for name, counter in COUNTERS.items():
                setattr(report, name, int(metric(base_url, counter)))
        except OSError as error:  # /metrics does not answer
            report.faults.append(f"the server is gone: {error}")
        report.minutes = round((time.monotonic() - start) / 60, 2)
    report.trend = trend(report.memory)
    return report


def render(report: Report) -> Table:
    """The report for a terminal."""
    table = Table(
        title=f"{report.minutes} minutes of {report.model}: {'good' if report.is_good else 'BAD'}"
    )
    table.add_column("what")
    table.add_column("found", justify="right")
    for kind, number in report.sent.items():
        table.add_row(f"{'injected' if kind in INJECTED else 'sent'}: {kind}", str(number))
    for name in ("requests", "most_at_once", "answered", "replayed", "near_ties", *COUNTERS):
        table.add_row(name.removeprefix("num_").replace("_", " "), str(getattr(report, name)))
    table.add_section()
    table.add_row("lost", str(report.lost))
    table.add_row("wrong", str(report.wrong))
    table.add_row("other faults", str(len(report.faults) - report.lost))
    table.add_row("most of the KV cache in use at rest", f"{report.kv_cache_usage:.2%}")
    table.add_row("blocks free at the end", f"{report.free_blocks} of {report.num_blocks}")
    if report.memory:
        first, last = report.memory[0].mib, report.memory[-1].mib
        table.add_row("server's memory, first and last round", f"{first:.0f}, {last:.0f} MiB")
    table.add_row("its trend after the warm-up", _trend_text(report.trend))
    return table


def _trend_text(found: Trend | None) -> str:
    if found is None:
        return "too few rounds"
    return (
        f"{found.mib_per_minute:+.2f} MiB a minute, {found.growth:+.1%} (at most {MAX_GROWTH:.0%})"
    )


def main() -> None:
    """Run, print the table and one JSON line; exit with 1 if anything was lost, wrong or leaked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with the model")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = soak(args.model, args.minutes, args.seed)
    Console(width=None if sys.stdout.isatty() else 100).print(render(report))
    for fault in report.faults[:20]:
        print(f"  {fault}")
    print(json.dumps(asdict(report)))
    sys.exit(not report.is_good)


if __name__ == "__main__":
    main()
