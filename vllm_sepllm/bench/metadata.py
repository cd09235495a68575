"""Cost of a decode step besides its forward: planning, metadata, scheduling.

Run: ``python -m vllm_sepllm.bench.metadata [--requests 256] [--context 32768] [--json]``. Needs no
weights and no GPU. One thread of one process; vLLM runs the same code in engine core and worker.
"""

import gc
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_sepllm import register
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.visibility import Policy

WARM_UP = 20
# a Llama whose sizes do not matter here, beyond heads that exist
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 21,
}


@dataclass(slots=True)
class Times:
    """Microseconds of each step by part."""

    parts: dict[str, list[float]] = field(default_factory=dict)

    def run(self, part: str, action: Callable[..., Any], *args: Any) -> Any:
        """Run ``action``, and remember how long it took."""
        start = time.perf_counter()
        result = action(*args)
        self.parts.setdefault(part, []).append((time.perf_counter() - start) * 1e6)
        return result

    def quantiles(self) -> dict[str, float]:
        """p20, median and p80 of each part after the warm-up."""
        found: dict[str, float] = {}
        for part, values in self.parts.items():
            cut = quantiles(values[WARM_UP:], n=10)
            found |= {f"{part}_us_p{p}": round(cut[p // 10 - 1], 1) for p in (20, 50, 80)}
        return found


def measure(num_requests: int, context: int, num_steps: int, *, is_sepllm: bool) -> Times:
    """Steps in which all of ``num_requests`` decode, 13 % of the tokens separators."""
    # vLLM takes 10 s to import and needs the plugin first
    register()
    from vllm_sepllm.integration.rigs.scheduler_rig import BuilderRig, Load, SchedulerRig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        load = Load(num_requests, context, density=0.13, enable_prefix_caching=True)
        rig = SchedulerRig(Path(folder), load, is_sepllm=is_sepllm)
    gc.collect()
    gc.freeze()  # as vLLM's engine core does after start-up
    times = Times()
    if is_sepllm:
        rig.watch_plans(lambda plan, output: times.run("plan", plan, output))
        builders = BuilderRig(rig)
    for step in range(num_steps + WARM_UP):
        output = times.run("schedule", rig.scheduler.schedule)
        if is_sepllm:
            if step % 8 == 0:  # blocks come slowly, and looking them up is not what is measured
                common = builders.common()
            times.run("build", builders.build, output, common)
            times.run("vllm_build", builders.build_wrapped, common)
            times.run("gpu_build", builders.plan_for_gpu, output)
        times.run("update", rig.finish, output)
    gc.unfreeze()
    return times


def bookkeeping(num_tokens: int) -> dict[str, float]:
    """Bytes per request, and time per token as the context grows, of the separators' index."""
    gen = np.random.default_rng(0)
    token_ids = (gen.random(num_tokens) < 0.13).astype(int).tolist()
    policy, separators = Policy(4, 252), TokenSeparators((1,))
    tracemalloc.start()
    index = SeparatorIndex(policy, separators)
    index.extend(token_ids, num_tokens)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    index, per_token, stride = SeparatorIndex(policy, separators), [], 64
    for end in range(stride, num_tokens + 1, stride):
        start = time.perf_counter()
        index.extend(token_ids, end)
        index.count_below(end - policy.window)
        per_token.append((time.perf_counter() - start) / stride * 1e9)
    at = np.arange(stride, num_tokens + 1, stride) / 1e6
    # without the extremes, which are interrupts
    low, high = np.quantile(per_token, [0.05, 0.95])
    kept = (per_token >= low) & (per_token <= high)
    slope, level = np.polyfit(at[kept], np.array(per_token)[kept], 1)
    return {
        "num_tokens": num_tokens,
        "bytes_per_request": held,
        "ns_per_token": round(float(level), 2),
        "ns_per_token_per_million_tokens": round(float(slope), 2),
    }


def render(rows: list[dict[str, Any]]) -> Table:
    """The table for a terminal."""
    table = Table(title="Microseconds of a decode step besides its forward, median (p20 to p80)")
    parts = ("plan", "build", "vllm_build", "gpu_build", "schedule", "update")
    for column in ("requests", "context", "side", *parts):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{row[f'{p}_us_p50']:.0f} ({row[f'{p}_us_p20']:.0f} to {row[f'{p}_us_p80']:.0f})"
            if f"{p}_us_p50" in row
            else "-"
            for p in parts
        ]
        table.add_row(str(row["requests"]), str(row["context"]), row["side"], *cells)
    return table


def main(
    requests: Annotated[list[int] | None, typer.Option(help="Default: 1 64 256 1024.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of each request.")] = 32768,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 100,
    stock: Annotated[bool, typer.Option(help="Also vLLM's own scheduler.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a row.")] = False,
) -> None:
    """Time the steps and print them.

    ``schedule`` includes ``plan``; ``build``, the CPU's, includes ``vllm_build``; ``gpu_build`` is
    what the GPU builder computes, without uploads, launches and the wrapped backend's own builder.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for num_requests in requests or [1, 64, 256, 1024]:
        for side in ("stock", "sepllm") if stock else ("sepllm",):
            times = measure(num_requests, context, steps, is_sepllm=side == "sepllm")
            row = {"requests": num_requests, "context": context, "side": side}
            rows.append(row | times.quantiles())
            if as_json:
                print(json.dumps(rows[-1]), flush=True)
    memory = bookkeeping(1_000_000)
    if as_json:
        print(json.dumps(memory))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(render(rows))
    console.print(memory)


if __name__ == "__main__":
    typer.run(main)
