"""Published figures of GPUs: what an SM can hold, and what a board can do at its peak."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """An architecture to compile for, with the limits of one SM (CU on AMD).

    Attributes:
        family: rows of the prefill kernel's tuning table.
        backend: Triton's name of the compiler.
        arch: Triton's name of the architecture.
        warp_size: threads a warp (wavefront).
        fp8: Triton's name of vLLM's fp8 type; None: the hardware does not convert it, and Triton
            compiles no kernel that reads it.
        num_registers: 32-bit registers for all threads.
        shared_bytes: shared memory for all programs.
        program_overhead: shared memory that the system takes for each program.
        max_warps: resident warps.
        is_for_fp8: compiled for fp8 caches alone; all else is that of another row of the family.
    """

    family: str
    backend: str
    arch: int | str
    warp_size: int
    fp8: str | None
    num_registers: int
    shared_bytes: int
    program_overhead: int
    max_warps: int
    is_for_fp8: bool = False

    def compiles(self, has_fp8_cache: bool) -> bool:
        """Whether a kernel with such a cache is compiled for it."""
        return self.fp8 is not None if has_fp8_cache else not self.is_for_fp8

    def programs_per_sm(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Programs that fit an SM by registers a thread, shared memory and warps: an estimate."""
        rounded = -(-registers // 8) * 8  # all of them allocate registers in steps of 8 a thread
        by_registers = self.num_registers // (rounded * self.warp_size * num_warps)
        by_shared = self.shared_bytes // max(1, shared_bytes + self.program_overhead)
        return min(by_registers, by_shared, self.max_warps // num_warps)


TARGETS = {
    "sm_80": Target("sm80", "cuda", 80, 32, None, 65536, 164 << 10, 1024, 64),
    "sm_89": Target("sm80", "cuda", 89, 32, "fp8e4nv", 65536, 100 << 10, 1024, 48, is_for_fp8=True),
    "sm_90": Target("sm90", "cuda", 90, 32, "fp8e4nv", 65536, 228 << 10, 1024, 64),
    "sm_100": Target("sm100", "cuda", 100, 32, "fp8e4nv", 65536, 228 << 10, 1024, 64),
    # 4 SIMDs of 512 registers for each of 64 lanes and 8 wavefronts
    "gfx942": Target("cdna", "hip", "gfx942", 64, "fp8e4b8", 4 * 512 * 64, 64 << 10, 0, 32),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak figures of a board from its maker's data sheet; dense, bf16.

    Attributes:
        name: of the board.
        flops: multiply and add counted apart, per second.
        bandwidth: of the memory, bytes per second.
        memory: bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "a100": Gpu("A100 SXM 80GB", 312e12, 2.039e12, 80e9),
    "h100": Gpu("H100 SXM 80GB", 989e12, 3.35e12, 80e9),
    "h200": Gpu("H200 SXM 141GB", 989e12, 4.8e12, 141e9),
    "b200": Gpu("B200 SXM 180GB", 2250e12, 7.7e12, 180e9),
    "mi300x": Gpu("MI300X 192GB", 1307e12, 5.3e12, 192e9),
}


# what drivers call the boards above, in full: others of the same family have other figures
DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "AMD Instinct MI300X": "mi300x",
}
