"""The measurement from outside: vLLM's own ``vllm bench serve`` against a server of each side."""

import json
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_sepllm.bench.results import Results
from vllm_sepllm.bench.sides import server_flags
from vllm_sepllm.processes import child_environment, serving

START_SECONDS = 600
# measure of vLLM's report -> our name, and the factor to the unit in it
_MEASURES = {
    "median_ttft_ms": ("ttft_s", 1e-3),
    "median_tpot_ms": ("time_per_token_s", 1e-3),
    "median_e2el_ms": ("latency_s", 1e-3),
    "output_throughput": ("output_tokens_per_s", 1.0),
    "total_token_throughput": ("all_tokens_per_s", 1.0),
}


def measures(report: dict[str, Any], num_requests: int) -> dict[str, float]:
    """Our measures, from the report that ``vllm bench serve`` wrote.

    Raises:
        RuntimeError: if not every request was answered.
    """
    if report["completed"] != num_requests:
        raise RuntimeError(f"only {report['completed']} of {num_requests} requests were answered")
    return {ours: report[theirs] * factor for theirs, (ours, factor) in _MEASURES.items()}


def bench_serve(
    sides: Sequence[str],
    model: str,
    prompts: Sequence[str],
    max_tokens: int,
    rounds: int,
    flags: Sequence[str],
    folder: Path,
    results: Results,
) -> None:
    """Send all prompts at once to each server in turn; the servers run side by side, idle.

    Args:
        sides: names of :data:`vllm_sepllm.bench.sides.SIDES`.
        model: as ``vllm serve`` takes it.
        prompts: texts.
        max_tokens: tokens of an answer.
        rounds: how often, after a round that warms up.
        flags: of ``vllm serve``, for all sides.
        folder: for logs and reports.
        results: gets the samples.
    """
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    with ExitStack() as stack:
        urls = {
            side: stack.enter_context(
                serving(
                    ["vllm", "serve", model, *flags, *server_flags(side)],
                    folder / f"{side}.log",
                    START_SECONDS,
                )
            )
            for side in sides
        }
        for number in range(rounds + 1):
            for side, url in urls.items():
                report = _run(model, url, data, len(prompts), max_tokens)
                if number:
                    case = f"{len(prompts)} requests"
                    results.add(case, side, **measures(report, len(prompts)))


def _run(model: str, url: str, data: Path, num_requests: int, max_tokens: int) -> dict[str, Any]:
    out = data.with_name("report.json")
    command = ["vllm", "bench", "serve", "--backend", "openai", "--model", model]
    command += ["--base-url", url.removesuffix("/v1"), "--dataset-name", "custom"]
    command += ["--dataset-path", str(data), "--num-prompts", str(num_requests)]
    command += ["--custom-output-len", str(max_tokens), "--skip-chat-template"]
    command += ["--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,tpot,e2el", "--save-result"]
    command += ["--result-dir", str(out.parent), "--result-filename", out.name]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(out.read_text())
    return report
