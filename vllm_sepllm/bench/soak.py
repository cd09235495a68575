"""Random traffic against ``vllm serve --attention-backend sepllm``: what is lost, wrong or leaks.

``python -m vllm_sepllm.bench.soak --model FOLDER --minutes N``. In rounds: peers send random
requests (lengths, shared prefixes, disconnects, aborts, invalid input, bursts beyond the pool),
then every finished answer is asked for again, alone and past the prefix cache, and must be the
same.
"""

import argparse
import asyncio
import json
import os
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

from vllm_sepllm.bench.soak_load import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    Client,
    ServerFault,
    Traffic,
    verdict,
)
from vllm_sepllm.demo.processes import serving

START_SECONDS = 300.0
ROUND_SECONDS = 15.0
NUM_SEPARATORS = 64
# four of the longest requests fit: a + n + s = 320 entries are 10 blocks of 32
NUM_BLOCKS = 48
POLICY = {"initial_tokens": 4, "window": 60, "max_separators": 256}
# of the resident memory half-way; allocators keep some of what a new batch shape needed
MAX_GROWTH = 0.05
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
        sent: kind of request -> number; a burst counts once.
        replayed: finished answers, each compared with a second one.
        near_ties: replays that part where the best two tokens are closer than float32 noise.
        wrong: replays that differ otherwise.
        faults: errors where there must be none, missing ones, answers that were lost.
        num_preemptions, num_prompt_tokens, num_cached_tokens, num_new_tokens: from /metrics.
        kv_cache_usage: highest of the pauses between rounds, when nothing runs.
        rss_mib: resident memory of the server's processes after each round.
        growth: of the last quarter over the second; None with too few rounds to tell.
    """

    model: str
    versions: dict[str, str]
    minutes: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    replayed: int = 0
    near_ties: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0
    kv_cache_usage: float = 0.0
    rss_mib: list[float] = field(default_factory=list)
    growth: float | None = None

    @property
    def is_good(self) -> bool:
        """No fault, nothing lost or wrong, every block free, memory level."""
        is_level = self.growth is None or self.growth <= MAX_GROWTH
        return not self.faults and not self.wrong and self.kv_cache_usage == 0 and is_level


def metric(base_url: str, name: str) -> float:
    """A gauge or counter of /metrics, summed over its labels.

    Raises:
        RuntimeError: if the server has none of that name.
    """
    opener = build_opener(ProxyHandler({}))
    with opener.open(base_url.removesuffix("/v1") + "/metrics", timeout=60) as page:
        text = page.read().decode()
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    if not values:
        raise RuntimeError(f"/metrics has no {name}")
    return sum(map(float, values))


def descendants_rss_mib(root: int) -> float:
    """Resident memory of all processes below ``root``, from /proc."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # the command's name, in brackets, may hold blanks
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)], pages[int(entry.name)] = int(fields[1]), int(fields[21])
    total = 0
    for pid in parents:
        ancestor = parents[pid]
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        total += pages[pid] if ancestor == root else 0
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(samples: list[float]) -> float | None:
    """How much the last quarter lies above the second, as a share of the second."""
    if len(samples) < 8:
        return None
    quarter = len(samples) // 4
    before = sorted(samples[quarter : 2 * quarter])[quarter // 2]
    after = sorted(samples[-quarter:])[quarter // 2]
    return after / before - 1


async def run(
    base_url: str, vocab_size: int, separators: list[int], seed: int, report: Report, seconds: float
) -> None:
    """Rounds of traffic and replays for about ``seconds``; fills ``report``."""
    client = Client(base_url)
    traffic = Traffic(client, vocab_size, separators, seed)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await traffic.run(min(ROUND_SECONDS, left / 2))
        await _check_idle(base_url, report)
        await _replay(client, traffic, report)
        await _check_idle(base_url, report)
        report.rss_mib.append(round(descendants_rss_mib(os.getpid()), 1))
        print(
            f"  {max(0.0, end - time.monotonic()):.0f} s left, {report.replayed} replayed, "
            f"{len(report.faults) + len(traffic.tally.faults)} faults, {report.wrong} wrong, "
            f"{report.rss_mib[-1]:.0f} MiB",
            flush=True,
        )
    await client.close()
    report.sent = dict(sorted(traffic.tally.sent.items()))
    report.faults += traffic.tally.faults


async def _replay(client: Client, traffic: Traffic, report: Report) -> None:
    """Ask again for what finished, one request at a time, nothing of it cached."""
    for request, answer in traffic.tally.finished:
        try:
            again = await client.ask(request, salt=client.fresh_salt())
        except (ServerFault, httpx.HTTPError) as error:
            report.faults.append(f"replay: {type(error).__name__} {error}")
            continue
        found = verdict(answer, again)
        report.replayed += 1
        report.near_ties += found == "near tie"
        report.wrong += found == "wrong"
    traffic.tally.finished.clear()


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
    """A server whose pool holds four of the longest requests, a third of a burst."""
    config = {"sepllm": POLICY | {"separators": separators}}
    command = ["vllm", "serve", str(model), "--served-model-name", MODEL_NAME]
    command += ["--attention-backend", "sepllm", "--additional-config", json.dumps(config)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--max-num-seqs", "8", "--max-num-batched-tokens", "256"]
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
    report.growth = growth(report.rss_mib)
    return report


def render(report: Report) -> Table:
    """The report for a terminal."""
    table = Table(
        title=f"{report.minutes} minutes of {report.model}: {'good' if report.is_good else 'BAD'}"
    )
    table.add_column("what")
    table.add_column("found", justify="right")
    for kind, number in report.sent.items():
        table.add_row(f"sent: {kind}", str(number))
    for name in ("replayed", "near_ties", "wrong", *COUNTERS):
        table.add_row(name.removeprefix("num_").replace("_", " "), str(getattr(report, name)))
    table.add_row("faults and losses", str(len(report.faults)))
    table.add_row("KV cache in use at rest", f"{report.kv_cache_usage:.2%}")
    if report.rss_mib:
        table.add_row(
            "server's memory, first and last round",
            f"{report.rss_mib[0]:.0f}, {report.rss_mib[-1]:.0f} MiB",
        )
    grown = "too few rounds" if report.growth is None else f"{report.growth:+.1%}"
    table.add_row("growth, last quarter over second", grown)
    return table


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
