"""Compile every kernel variant ahead of time and tabulate what the compiler made of it.

Run: ``python -m vllm_sepllm.bench.compile [--json] [--target sm_90] [--variant NAME]``. Needs no
GPU and says nothing about speed: registers, spills and shared memory are the compiler's, occupancy
is arithmetic over published limits. With tensor-core instructions and next to no register spills a
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
from rich.console import Console
from rich.table import Table
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import get_cache_key, make_backend

from vllm_sepllm.bench.gpus import TARGETS, Target
from vllm_sepllm.bench.variants import VARIANTS, Variant, source_of
from vllm_sepllm.kernels.tuning import Tuning

# scalars that wait on the stack for the end of a loop; keys, scores or sums would be hundreds
FEW_SPILL_BYTES = 64
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)")


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
    source, tuning = source_of(variant, target)
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
    source, tuning = source_of(variant, target)
    backend = make_backend(_gpu_target(target))
    options = backend.parse_options(_options(tuning) | source.parse_options())
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return sha256(key.encode()).hexdigest()


def _gpu_target(target: Target) -> GPUTarget:
    return GPUTarget(target.backend, target.arch, target.warp_size)


def _options(tuning: Tuning) -> dict[str, int]:
    return {
        "num_warps": tuning.num_warps,
        "num_stages": tuning.num_stages,
        "enable_fp_fusion": True,  # as the prefill kernel is launched; elsewhere it hardly matters
    }


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
    """The variants of some names (all if there is none) for those targets that have them.

    ``known`` has results by key: such a compilation would give the same again, and is left out.
    """
    for target in targets:
        for variant in VARIANTS:
            is_asked = not names or variant.name in names
            if is_asked and TARGETS[target].compiles(variant.has_fp8_cache):
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
    """Parse the command line, compile, print; fail on a spill of more than scalars."""
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
    if any(row.spill_bytes > FEW_SPILL_BYTES for row in rows):
        sys.exit("some variants spill registers")


if __name__ == "__main__":
    main()
