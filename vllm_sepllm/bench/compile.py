"""Compile every kernel variant ahead of time and tabulate what the compiler made of it.

Run: ``python -m vllm_sepllm.bench.compile [--json] [--target sm_90] [--variant NAME]``. Needs no
GPU and says nothing about speed: registers, spills and shared memory are the compiler's, occupancy
is arithmetic over published limits. Without register spills and with tensor-core instructions a
kernel can be fast; whether it is, only a timing on the GPU tells.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, get_cache_key, make_backend

from vllm_sepllm.bench.gpus import TARGETS, Target
from vllm_sepllm.kernels.prefill import prefill_kernel
from vllm_sepllm.kernels.slots import slots_kernel
from vllm_sepllm.kernels.spill import spill_kernel
from vllm_sepllm.kernels.tuning import Tuning, tuning_for

TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")
GROUP = 4  # query heads a KV head of the compiled variants: Llama 3 8B


@dataclass(frozen=True, slots=True)
class Variant:
    """Arguments that select one compilation of a kernel.

    Attributes:
        kernel: "prefill", "spill" or "slots".
        name: what the table calls it.
        head_size: of the prefill kernel; elements a row of the spill kernel.
        dtype: Triton's name of the query's type; the unit that spill copies.
        has_fp8_cache: prefill from an fp8 cache.
        has_extras: prefill with soft cap and attention sinks.
    """

    kernel: str
    name: str
    head_size: int
    dtype: str
    has_fp8_cache: bool = False
    has_extras: bool = False


_EVERYTHING = {"has_fp8_cache": True, "has_extras": True}
VARIANTS = (
    *(Variant("prefill", f"bf16 head {size}", size, "bf16") for size in (64, 80, 128, 256)),
    Variant("prefill", "fp16 head 128", 128, "fp16"),
    Variant("prefill", "bf16 head 128, fp8 cache", 128, "bf16", has_fp8_cache=True),
    Variant("prefill", "bf16 head 128, soft cap, sinks", 128, "bf16", has_extras=True),
    *(
        Variant(
            "prefill", f"bf16 head {size}, fp8 cache, soft cap, sinks", size, "bf16", **_EVERYTHING
        )
        for size in (64, 128, 256)
    ),
    *(Variant("prefill", f"fp32 head {size}", size, "fp32") for size in (128, 256)),
    Variant("spill", "8-byte units, row 64", 64, "i64"),
    Variant("spill", "2-byte units, row 96", 96, "i16"),
    Variant("slots", "blocks of 16", 1, "i64"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What the compiler made of one variant.

    Attributes:
        registers: 32-bit registers a thread.
        spill_bytes: private memory a thread uses, 0 if every value found a register.
        scalar_spills: AMD's scalar registers kept in vector registers (no memory).
        shared_bytes: shared memory a program.
        num_warps: warps a program.
        programs_per_sm: programs that fit an SM, an estimate from registers and shared memory.
        occupancy: resident warps as a share of the most an SM can hold, an estimate.
        tensor_core: tensor-core instructions in the assembly, name -> count.
        key: Triton's hash of all that the compilation depends on: see :func:`compilation_key`.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    spill_bytes: int
    scalar_spills: int
    shared_bytes: int
    num_warps: int
    programs_per_sm: int
    occupancy: float
    tensor_core: dict[str, int]
    key: str


def compile_variant(variant: Variant, target_name: str) -> Result:
    """Compile one variant for one target.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where nothing is compiled.
    """
    target = TARGETS[target_name]
    source, tuning = _source_of(variant, target)
    built = triton.compile(source, target=_gpu_target(target), options=_options(tuning))
    is_amd = target.backend == "hip"
    registers, spill_bytes, scalar_spills = (_amd_usage if is_amd else _nvidia_usage)(built)
    assembly = built.asm["amdgcn" if is_amd else "ptx"]
    found = TENSOR_CORE.findall(assembly)
    shared = int(built.metadata.shared)
    programs = target.programs_per_sm(registers, shared, tuning.num_warps)
    return Result(
        kernel=variant.kernel,
        variant=variant.name,
        target=target_name,
        registers=registers,
        spill_bytes=spill_bytes,
        scalar_spills=scalar_spills,
        shared_bytes=shared,
        num_warps=tuning.num_warps,
        programs_per_sm=programs,
        occupancy=round(programs * tuning.num_warps / target.max_warps, 3),
        tensor_core={name: found.count(name) for name in sorted(set(found))},
        key=built.hash,
    )


def compilation_key(variant: Variant, target_name: str) -> str:
    """What Triton's own cache calls the compilation, without compiling.

    It covers the kernel's source and what that calls, constants, types, options, target, and the
    compiler itself: Triton's files, its library and the assembler's version.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where nothing is compiled.
    """
    target = TARGETS[target_name]
    source, tuning = _source_of(variant, target)
    backend = make_backend(_gpu_target(target))
    options = backend.parse_options(_options(tuning) | source.parse_options())
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return sha256(key.encode()).hexdigest()


def _source_of(variant: Variant, target: Target) -> tuple[ASTSource, Tuning]:
    if not isinstance(prefill_kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels are interpreted, not compiled: unset TRITON_INTERPRET")
    if variant.kernel == "prefill":
        element_bytes = 4 if variant.dtype == "fp32" else 2
        tuning = tuning_for(variant.head_size, element_bytes, GROUP, target.family)
        return _prefill_source(variant, target, tuning), tuning
    source = _spill_source(variant) if variant.kernel == "spill" else _slots_source()
    return source, Tuning(1, 1, 4, 1)


def _gpu_target(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, target.warp_size)


def _options(tuning: Tuning) -> dict[str, int]:
    return {"num_warps": tuning.num_warps, "num_stages": tuning.num_stages}


def _source(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """Every pointer and stride a multiple of 16, as vLLM's tensors are."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name.startswith("stride_") and name in types)
    ]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )


def _prefill_source(variant: Variant, target: Target, tuning: Tuning) -> ASTSource:
    cache = target.fp8 if variant.has_fp8_cache else variant.dtype
    types = {f"{name}_ptr": f"*{variant.dtype}" for name in ("query", "key", "value", "out")}
    types |= {f"{name}_cache_ptr": f"*{cache}" for name in ("key", "value")}
    tables = ("block_table", "tiles", "requests", "separators", "until")
    types |= {f"{name}_ptr": "*i32" for name in tables}
    strides = ("query", "key", "value", "out", "block", "head", "token", "table")
    types |= {f"stride_{name}": "i32" for name in strides} | {"scale": "fp32", "soft_cap": "fp32"}
    constants: dict[str, Any] = {"stride_row": 1}
    for name, is_used in (
        ("sinks_ptr", variant.has_extras),
        ("key_scale_ptr", variant.has_fp8_cache),
        ("value_scale_ptr", variant.has_fp8_cache),
    ):
        if is_used:
            types[name] = "*fp32"
        else:
            constants[name] = None
    constants |= {
        "INITIAL": 4,
        "MAX_SEPARATORS": 2**30,
        "GROUP": GROUP,
        "HEAD": variant.head_size,
        "HEAD_POW2": triton.next_power_of_2(variant.head_size),
        "BLOCK_SIZE": 16,
        "BLOCK_ROWS": tuning.block_rows,
        "BLOCK_KEYS": tuning.block_keys,
        "USE_SOFT_CAP": variant.has_extras,
        "DOT_DTYPE": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[variant.dtype],
    }
    return _source(prefill_kernel, types, constants)


def _spill_source(variant: Variant) -> ASTSource:
    types = {"cache_ptrs": "*i64", "src_ptr": "*i64", "dst_ptr": "*i64", "num_heads": "i32"}
    types |= {f"stride_{name}": "i32" for name in ("block", "head", "token")}
    constants = {
        "stride_row": 1,
        "BLOCK_SIZE": 16,
        "ROW": variant.head_size,
        "ROW_POW2": triton.next_power_of_2(variant.head_size),
        "BLOCK_HEADS": 8,
        "UNIT": {"i64": tl.int64, "i16": tl.int16}[variant.dtype],
    }
    return _source(spill_kernel, types, constants)


def _slots_source() -> ASTSource:
    types = {"entries_ptr": "*i64", "block_table_ptr": "*i32", "out_ptr": "*i64"}
    types |= {"num_entries": "i32", "stride_table": "i32"}
    return _source(slots_kernel, types, {"BLOCK_SIZE": 16, "BLOCK": 256})


def _nvidia_usage(built: Any) -> tuple[int, int, int]:
    """(registers, stack bytes, 0); ptxas keeps on the stack what it spills."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(_search(rf"{key}:(\d+)", text)) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, 0


def _amd_usage(built: Any) -> tuple[int, int, int]:
    """(vector registers, accumulation ones included; private bytes; scalar spills)."""
    text = built.asm["amdgcn"]
    registers, private, scalars = (
        int(_search(rf"\.{key}:\s*(\d+)", text))
        for key in ("vgpr_count", "private_segment_fixed_size", "sgpr_spill_count")
    )
    return registers, private, scalars


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"the compiler's report has no {pattern}"
    return match[1]


def results(names: list[str], targets: list[str], known: dict[str, Result]) -> Iterator[Result]:
    """The variants of some names (all if there is none) for some targets.

    ``known`` has results by key: such a compilation would give the same again, and is left out.
    """
    for target in targets:
        for variant in VARIANTS:
            if not names or variant.name in names:
                same = known.get(compilation_key(variant, target)) if known else None
                yield same or compile_variant(variant, target)


def read_results(path: Path) -> dict[str, Result]:
    """Key -> result of a file that ``--json`` wrote."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    names = [field.name for field in fields(Result)]
    return {row["key"]: Result(**{name: row[name] for name in names}) for row in rows}


def render(rows: list[Result]) -> Table:
    """The table for a terminal."""
    table = Table(title="Compiled ahead of time, not run: no statement about speed")
    for column in ("kernel", "variant", "target", "tensor-core instructions"):
        table.add_column(column)
    for column in ("registers", "spills B", "shared KiB", "warps", "programs/SM", "occupancy"):
        table.add_column(column, justify="right")
    for row in rows:
        cores = ", ".join(f"{count} {name}" for name, count in row.tensor_core.items())
        numbers = (row.registers, row.spill_bytes, f"{row.shared_bytes / 1024:.0f}", row.num_warps)
        cells = (row.kernel, row.variant, row.target, cores or "-", *map(str, numbers))
        table.add_row(*cells, str(row.programs_per_sm), f"{row.occupancy:.0%}")
    return table


def main() -> None:
    """Parse the command line, compile, print; fail on a spill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="one JSON line a variant")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variant", action="append", choices=names, help="default: all")
    parser.add_argument("--known", type=Path, help="of --json: take from it what is unchanged")
    args = parser.parse_args()
    known = read_results(args.known) if args.known else {}
    rows = []
    for row in results(args.variant or [], args.target or list(TARGETS), known):
        rows.append(row)
        if args.json:
            print(json.dumps(asdict(row) | {"triton": version("triton")}), flush=True)
    if not args.json:
        Console(width=None if sys.stdout.isatty() else 150).print(render(rows))
    if any(row.spill_bytes for row in rows):
        sys.exit("some variants spill registers")


if __name__ == "__main__":
    main()
