"""Times of a layer's prefill attention on a CPU, beside a limit from stock vLLM's kernel.

Run: ``python -m vllm_sepllm.bench.cpu_prefill [--length 8192] [--json]``. One layer
in bf16, random values and separators, no engine. The limit is what stock vLLM's kernel would need
for the keys that sepllm's queries read, at its own time a key.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vllm_sepllm import register
from vllm_sepllm.bench.roofline import POLICY
from vllm_sepllm.policy.kept import kept_lengths
from vllm_sepllm.policy.visibility import Policy

TILE = 128  # queries, as the builder cuts them
Row = dict[str, Any]


def interleaved(
    actions: Mapping[str, Callable[[torch.Tensor], object]], out: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Milliseconds of each action, medians of rounds in which they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action(out)
            if number:  # the first allocates
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in taken.items()}


def measure(
    heads: tuple[int, int, int], length: int, policy: Policy, density: float, rounds: int
) -> Row:
    """One row of the table."""
    # vLLM takes 10 s to import and needs the plugin first
    register()
    from vllm_sepllm.integration.rigs.prefill_rig import PrefillRig

    is_separator = np.random.default_rng(0).random(length) < density
    rig = PrefillRig(heads, is_separator, policy, TILE)
    actions = {"stock": rig.stock, "sepllm": rig.sepllm, "fill": rig.fill}
    times = interleaved(actions, torch.empty_like(rig.query), rounds)
    read = {"stock": length * (length + 1) // 2}
    read["sepllm"] = int(kept_lengths(policy, is_separator).sum())
    ns = {name: times[name] * 1e6 / pairs / heads[0] for name, pairs in read.items()}
    return {
        "tokens": length,
        "keys_a_query": f"{read['stock'] / length:.0f} / {read['sepllm'] / length:.0f}",
        "stock_ms": round(times["stock"], 2),
        "sepllm_ms": round(times["sepllm"], 2),
        "of_it_copies_ms": round(times["fill"], 2),
        "ns_a_key": f"{ns['stock']:.3f} / {ns['sepllm']:.3f}",
        "limit_ms": round(times["stock"] * read["sepllm"] / read["stock"], 2),
    }


def main(
    length: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    density: Annotated[float, typer.Option(help="Share of separators.")] = 0.045,
    window: Annotated[int, typer.Option(help="Most recent tokens.")] = POLICY.window,
    num_heads: Annotated[int, typer.Option(help="Query heads; default: SmolLM2-135M's.")] = 9,
    num_kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 3,
    head_size: Annotated[int, typer.Option(help="Elements a head.")] = 64,
    rounds: Annotated[int, typer.Option(help="Samples.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a row.")] = False,
) -> None:
    """Time one layer and print a table."""
    heads = (num_heads, num_kv_heads, head_size)
    policy = replace(POLICY, window=window, max_separators=None)
    rows = [measure(heads, n, policy, density, rounds) for n in length or (1024, 8192, 32768)]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(title="One layer's prefill attention; a / b: full / sepllm")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    typer.run(main)
