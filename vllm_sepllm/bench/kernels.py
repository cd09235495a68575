"""Time the kernels on a GPU, one layer at a time, beside full attention on the same GPU.

Run: ``python -m vllm_sepllm.bench.kernels [SUITE ...] [--json]``, SUITE one of ``check prefill
decode spill host``. Needs a CUDA or ROCm GPU; nothing here is a whole model or a server.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_sepllm import ops
from vllm_sepllm.bench.kernel_cases import (
    BLOCK_SIZE,
    DENSITY,
    HEADS,
    POLICY,
    Heads,
    chunk,
    paged,
    randn,
)
from vllm_sepllm.ops import reference

CHUNK = 8192  # vLLM's max_num_batched_tokens of a server
CONTEXTS = (8192, 32768, 131072)
L2_BYTES = 256 << 20  # several times any L2 cache
LEAST_SAMPLES, MOST_SAMPLES, ENOUGH_MS = 5, 40, 100.0
Row = dict[str, Any]
Action = Callable[[], object]


def interleaved(actions: Mapping[str, Action]) -> dict[str, float]:
    """Milliseconds of each action on the device, medians of samples in which they take turns.

    Each is replayed from a CUDA graph, as vLLM replays a decode step: the CPU does not show. The
    L2 cache is overwritten before each sample.
    """
    graphs = {}
    for name, action in actions.items():
        action()  # compiles
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            action()
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    taken: dict[str, list[float]] = {name: [] for name in actions}
    while len(next(iter(taken.values()))) < MOST_SAMPLES:
        for name, graph in graphs.items():
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            flush.zero_()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            taken[name].append(begin.elapsed_time(end))
        samples = list(taken.values())
        if len(samples[0]) >= LEAST_SAMPLES and sum(map(sum, samples)) > ENOUGH_MS:
            break
    return {name: median(values) for name, values in taken.items()}


def check() -> Iterator[Row]:
    """Error of the prefill kernel, and of torch in the same dtype, against torch in float32."""
    for heads in HEADS:
        for dtype in (torch.bfloat16, torch.float16):
            case = chunk(heads, 3840, 4096, dtype=dtype)
            got = torch.full_like(case.query, float("nan"))
            wanted = torch.empty_like(case.query, dtype=torch.float32)
            case.run(got)
            case.run_reference(wanted)
            error = (got.float() - wanted).norm() / wanted.norm()
            rounding = (wanted.to(dtype).float() - wanted).norm() / wanted.norm()
            yield {
                "suite": "check",
                "model": heads.model,
                "dtype": str(dtype).removeprefix("torch."),
                "relative_error": round(error.item(), 6),
                "error_of_rounding_alone": round(rounding.item(), 6),
                "error_of_baseline": round(_baseline_error(heads), 6),
            }


def _baseline_error(heads: Heads) -> float:
    """Error of vLLM's Triton kernel as it is timed here, against torch in float32."""
    from vllm_sepllm.integration.rigs.stock_attention import StockTriton

    query = randn((512, heads.num_heads, heads.size), torch.bfloat16)
    (cache, table), out = paged(heads, 1, 2048, query.dtype), torch.empty_like(query)
    StockTriton(query, 2048, cache, table).run(out)
    rows = table[0].long()
    keys, values = (
        part[rows].transpose(1, 2).flatten(0, 1).float() for part in (cache.key, cache.value)
    )
    visible = torch.ones(512, 2048, dtype=torch.bool, device=query.device).tril(2048 - 512)
    wanted = reference.attend(query.float(), keys, values, visible, heads.size**-0.5)
    return float((out.float() - wanted).norm() / wanted.norm())


def prefill() -> Iterator[Row]:
    """A whole prompt: full attention in one call, SepLLM and vLLM's Triton kernel in chunks."""
    for heads in HEADS:
        for context in CONTEXTS:
            times = _dense_prefill(heads, context)
            flops, sums = 0.0, {"triton_full": 0.0, "sepllm": 0.0}
            for start in range(0, context, CHUNK):
                flops += _time_chunk(heads, start, sums)
            full_flops = 2.0 * context * (context + 1) * heads.num_heads * heads.size
            times |= sums
            yield {
                "suite": "prefill",
                "model": heads.model,
                "context": context,
                **{f"{name}_ms": round(value, 3) for name, value in times.items()},
                "sepllm_tflops": round(flops / times["sepllm"] / 1e9),
                "best_full_tflops": round(full_flops / _best_full(times) / 1e9),
                "times_faster": round(_best_full(times) / times["sepllm"], 2),
                "flops_saved": round(1 - flops / full_flops, 3),
            }


def _time_chunk(heads: Heads, start: int, sums: dict[str, float]) -> float:
    """Add the times of one chunk; return the kernel's FLOP."""
    from vllm_sepllm.integration.rigs.stock_attention import StockTriton

    case, end = chunk(heads, start, start + CHUNK), start + CHUNK
    out = torch.empty_like(case.query)
    full = paged(heads, 1, end, case.query.dtype)
    stock = StockTriton(case.query, end, *full)
    both = {"triton_full": partial(stock.run, out), "sepllm": partial(case.run, out)}
    for name, value in interleaved(both).items():
        sums[name] += value
    return case.flops


def _dense_prefill(heads: Heads, context: int) -> dict[str, float]:
    """PyTorch's fused kernels over contiguous keys, the least a full prefill can cost in torch."""
    shapes = [(1, n, context, heads.size) for n in (heads.num_heads, *(heads.num_kv_heads,) * 2)]
    query, key, value = (randn(shape, torch.bfloat16) for shape in shapes)
    run = partial(
        torch.nn.functional.scaled_dot_product_attention,
        query,
        key,
        value,
        is_causal=True,
        enable_gqa=True,
    )
    times: dict[str, float] = {}
    for name, backend in (
        ("flash_full", SDPBackend.FLASH_ATTENTION),
        ("cudnn_full", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            with sdpa_kernel(backend):
                times |= interleaved({name: run})
        except RuntimeError as error:  # a kernel that this head size or this GPU has not
            print(f"{name}, head size {heads.size}: {str(error).splitlines()[0]}", file=sys.stderr)
    return times


def _best_full(times: dict[str, float]) -> float:
    return min(value for name, value in times.items() if name.endswith("_full"))


def decode() -> Iterator[Row]:
    """vLLM's Triton decode kernel over all keys, and over those that SepLLM keeps."""
    from vllm_sepllm.integration.rigs.stock_attention import StockTriton

    heads = HEADS[1]
    for context in CONTEXTS:
        for batch in (1, 16, 64):
            kept = POLICY.num_dense + round((context - POLICY.num_dense) * DENSITY)
            shape = (batch, heads.num_heads, heads.size)
            query = randn(shape, torch.bfloat16)
            out = torch.empty_like(query)
            actions: dict[str, Action] = {}
            for name, num_keys in (("full", context), ("sepllm", kept)):
                kv = paged(heads, batch, num_keys, query.dtype)
                stock = StockTriton(query, num_keys, *kv)
                actions[name] = partial(stock.run, out)
            times = interleaved(actions)
            yield {
                "suite": "decode",
                "model": heads.model,
                "context": context,
                "batch": batch,
                "kept": kept,
                **{f"{name}_us": round(value * 1e3, 1) for name, value in times.items()},
                "times_faster": round(times["full"] / times["sepllm"], 2),
            }


def spill() -> Iterator[Row]:
    """The kernel's launch before a step, for all layers of Llama-3-8B, beside one plain copy."""
    heads, layers = HEADS[1], 32
    memory = torch.empty(layers, 2, 4096, BLOCK_SIZE, heads.num_kv_heads, heads.size).bfloat16()
    caches = list(memory.cuda().transpose(3, 4).flatten(0, 1).unbind())
    table = ops.CacheTable.build(caches)
    for moves in (1, 8, 64, 1024):
        slots = torch.randperm(4096 * BLOCK_SIZE, device="cuda")
        src, dst = slots[:moves].clone(), slots[moves : 2 * moves].clone()
        size = moves * len(caches) * heads.num_kv_heads * heads.size * 2
        plain = torch.empty(2, size, dtype=torch.uint8, device="cuda")
        spilling, copying = partial(ops.spill, table, src, dst), partial(plain[0].copy_, plain[1])
        times = interleaved({"spill": spilling, "copy": copying})
        yield {
            "suite": "spill",
            "moves": moves,
            "bytes": size,
            **{f"{name}_us": round(value * 1e3, 1) for name, value in times.items()},
            "spill_gb_s": round(2 * size / times["spill"] / 1e6),
        }


def host() -> Iterator[Row]:
    """Microseconds of the CPU that a call takes, which asks nothing of the device."""
    heads = HEADS[1]
    case = chunk(heads, 8192, 8192 + 64)
    out = torch.empty_like(case.query)
    entries = torch.zeros(2, 256, dtype=torch.int64, device="cuda")
    slots = torch.empty(256, dtype=torch.int64, device="cuda")
    table = ops.CacheTable.build([case.cache.key, case.cache.value])
    one = torch.zeros(1, dtype=torch.int64, device="cuda")
    calls: dict[str, Action] = {
        "list_keys": partial(ops.list_keys, case.metadata, case.block_table, BLOCK_SIZE),
        "prefill": partial(case.run, out),
        "spill": partial(ops.spill, table, one, one),
        "entry_slots": partial(ops.entry_slots, entries, case.block_table, BLOCK_SIZE, slots),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        taken = []
        for _ in range(200):
            begin = time.perf_counter()
            call()
            taken.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        yield {"suite": "host", "call": name, "us": round(median(taken), 1)}


SUITES = {suite.__name__: suite for suite in (check, prefill, decode, spill, host)}


def render(rows: list[Row]) -> Table:
    """The table of one suite."""
    table = Table(title=f"{rows[0]['suite']} on {torch.cuda.get_device_name()}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(row.get(column, "-")) for column in rows[0]))
    return table


def main(
    suites: Annotated[list[str] | None, typer.Argument(help=f"Some of {' '.join(SUITES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a row.")] = False,
) -> None:
    """Run the suites, all if none is named, and print a table of each."""
    if wrong := set(suites or []) - set(SUITES):
        raise typer.BadParameter(f"no suite {', '.join(sorted(wrong))}: {', '.join(SUITES)}")
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench.kernels needs a GPU and torch sees none: run it where vLLM runs on one; "
            "bench.compile and bench.roofline need none"
        )
    where = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for name in suites or SUITES:
        rows = []
        for row in SUITES[name]():
            rows.append(row)
            if as_json:
                print(json.dumps(row | where), flush=True)
        if not as_json:
            Console(width=None if sys.stdout.isatty() else 150).print(render(rows))


if __name__ == "__main__":
    typer.run(main)
