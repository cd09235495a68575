"""Time every launch of the prefill kernel worth trying, to fill kernels/tuning.py by measurement.

Run: ``python -m vllm_sepllm.bench.tune [--context 32768] [--json]``. Needs a GPU. The search space
is :data:`SPACE`; what does not compile (shared memory, registers) is left out.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Annotated

import torch
import triton
import typer

from vllm_sepllm.bench.kernel_cases import HEADS, Chunk, Heads, chunk
from vllm_sepllm.kernels.tuning import Tuning

CHUNK = 8192
# rows, keys, warps, stages
SPACE = [Tuning(*values) for values in product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]


def make(heads: Heads, context: int, tuning: Tuning, size: int = CHUNK) -> Chunk:
    """The last chunk of a prompt, in tiles of as many rows as the launch has."""
    return chunk(heads, context - size, context, tile_tokens=tuning.block_rows // heads.group)


def compiles(heads: Heads, tuning: Tuning) -> bool:
    """Compile in a process of its own, into the cache that all share."""
    case = make(heads, 2048, tuning, 64)
    try:
        case.run(torch.empty_like(case.query), tuning=tuning)
        torch.cuda.synchronize()
    except (triton.runtime.errors.OutOfResources, RuntimeError):
        return False
    return True


def main(
    context: Annotated[int, typer.Option(help="Tokens before and in the last chunk.")] = 32768,
    processes: Annotated[int, typer.Option(help="That compile at once.")] = 12,
    best: Annotated[int, typer.Option(help="Lines to print of each model.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line for each launch.")] = False,
) -> None:
    """Compile in parallel, time one after the other, print the fastest first."""
    if not torch.cuda.is_available():
        raise SystemExit("bench.tune needs a GPU and torch sees none: run it on one")
    space = list(product(HEADS, SPACE))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        good = list(pool.map(compiles, *zip(*space, strict=True)))
    for heads in HEADS:
        rows = []
        for (mine, tuning), is_good in zip(space, good, strict=True):
            if mine is not heads or not is_good:
                continue
            case = make(heads, context, tuning)
            run = partial(case.run, torch.empty_like(case.query), tuning=tuning)
            taken = triton.testing.do_bench(run, 5, 25, return_mode="median")
            rows.append((taken, case.flops / taken / 1e9, tuning))
        rows.sort(key=lambda row: row[0])
        for taken, tflops, tuning in rows if as_json else rows[:best]:
            name = f"{heads.model}, head {heads.size}"
            if as_json:
                print(json.dumps({"model": name, "ms": taken, "tflops": tflops, "t": str(tuning)}))
            else:
                print(f"{name}: {taken:.3f} ms, {tflops:.0f} TFLOP/s, {tuning}")


if __name__ == "__main__":
    typer.run(main)
