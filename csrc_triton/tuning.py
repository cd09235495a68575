"""Launch parameters of the prefill kernel, from a fixed table: no autotuning while serving.

Every row compiles to a kernel that keeps scores, sums and keys in registers and, for 16-bit
queries, uses tensor-core instructions (``python -m vllm_sepllm.bench.compile``). Those of sm90 are
the fastest that ``python -m vllm_sepllm.bench.tune`` timed on an H100; other rows were never timed.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from vllm_sepllm.kernels.arguments import MAX_HEAD_SIZE


@dataclass(frozen=True, slots=True)
class Tuning:
    """One way to compile the prefill kernel.

    Attributes:
        block_rows: rows of a tile: query tokens times query heads a KV head.
        block_keys: keys a step of the online softmax.
        num_warps: warps (wavefronts on AMD) a program.
        num_stages: depth of the load pipeline.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


# (family, padded head size of 16-bit operands) -> launch parameters
_TABLE = {
    ("sm80", 64): Tuning(64, 64, 8, 2),
    ("sm80", 128): Tuning(64, 64, 8, 2),
    ("sm80", 256): Tuning(64, 32, 8, 1),
    ("sm90", 64): Tuning(128, 64, 4, 3),
    ("sm90", 128): Tuning(128, 32, 4, 3),
    ("sm90", 256): Tuning(128, 64, 8, 3),
    ("sm100", 64): Tuning(128, 32, 8, 2),
    ("sm100", 128): Tuning(128, 64, 8, 2),
    ("sm100", 256): Tuning(64, 32, 8, 2),
    ("cdna", 64): Tuning(128, 32, 4, 1),
    ("cdna", 128): Tuning(128, 32, 4, 1),
    ("cdna", 256): Tuning(64, 32, 4, 1),
}
# float32 has no tensor cores on NVIDIA: the products unroll, and wider tiles spill
_FLOAT32 = Tuning(16, 16, 4, 1)
# several steps of the softmax even in a small test
_INTERPRETER = Tuning(64, 32, 4, 1)


@cache
def device_family() -> str:
    """Which rows of the table the current device uses."""
    if not torch.cuda.is_available():
        return "interpreter"
    if torch.version.hip:
        return "cdna"
    major, _ = torch.cuda.get_device_capability()
    # consumer cards (8.x, 12.x) have at most 100 KiB of shared memory, and 12.x no tcgen05
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


@cache
def tuning_for(head_size: int, element_bytes: int, group: int, family: str = "") -> Tuning:
    """Launch parameters for a head size, element size and query heads a KV head.

    Args:
        head_size: 1 to 256.
        element_bytes: of the query.
        group: query heads a KV head.
        family: a family of the table instead of the current device's.

    Raises:
        ValueError: if the head is larger than the table knows.
    """
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"head_size must be <= {MAX_HEAD_SIZE}, got {head_size}")
    family = family or device_family()
    if family == "interpreter":
        tuning = _INTERPRETER
    elif element_bytes == 4:
        tuning = _FLOAT32
    else:
        tuning = _TABLE[family, max(64, triton.next_power_of_2(head_size))]
    rows = max(tuning.block_rows, triton.next_power_of_2(group))
    return replace(tuning, block_rows=rows)
