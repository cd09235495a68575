"""What the compilers make of the kernels for real GPUs; compiled ahead of time, nothing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# what ``python -m vllm_sepllm.bench.compile --json`` printed; written again after a kernel changed
RECORD = Path(__file__).with_name("compiled.jsonl")
TENSOR_CORE = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}


def compile_table(*arguments: str) -> list[dict]:
    """Rows of the command in a process of its own: kernels are interpreted in this one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "vllm_sepllm.bench.compile", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    from vllm_sepllm.bench.compile import FEW_SPILL_BYTES

    for row in rows:
        # scalars that wait for the end of a loop; the launches of sm90 were timed with them
        assert row["spill_bytes"] <= (FEW_SPILL_BYTES if row["target"] == "sm_90" else 0), row
        assert row["programs_per_sm"] >= 1, row
        if row["kernel"] == "prefill" and not row["variant"].startswith("fp32"):
            assert row["tensor_core"].get(TENSOR_CORE[row["target"]], 0) > 0, row


def test_main_variants_use_tensor_cores_and_spill_scalars_at_most() -> None:
    names = ("bf16 head 128", "8-byte units, row 64", "turn bf16 head 128", "blocks of 16")
    rows = compile_table(*(argument for name in names for argument in ("--variant", name)))
    assert len(rows) == len(names) * len(set(TENSOR_CORE) - {"sm_89"})
    check(rows)
    recorded = {row["key"]: row for row in recorded_rows()}
    for row in rows:
        assert row == recorded.get(row["key"], row), "the record is not what the compiler says"


@pytest.mark.slow
def test_every_variant_uses_tensor_cores_and_spills_scalars_at_most() -> None:
    """Proves it for all variants and targets. Triton's hash of a compilation covers sources,
    options and compiler: with the same hash the recorded result is the result, and the five
    minutes of compiling are spent on what differs alone.
    """
    from vllm_sepllm.bench.compile import VARIANTS

    rows = compile_table("--known", str(RECORD))
    fp8 = [variant for variant in VARIANTS if variant.has_fp8_cache]
    # of the two halves of sm80, one has fp8 caches and the other all else
    assert len(rows) == len(VARIANTS) * (len(TENSOR_CORE) - 1)
    assert {row["variant"] for row in rows if row["target"] == "sm_89"} == {v.name for v in fp8}
    check(rows)
    num_known = sum(row in recorded_rows() for row in rows)
    print(f"{num_known} of {len(rows)} compilations are as recorded")


def test_a_changed_compilation_is_not_taken_from_the_record(tmp_path: Path) -> None:
    (row,) = compile_table("--variant", "blocks of 16", "--target", "sm_90")
    wrong = row | {"spill_bytes": 1}
    stale = tmp_path / "stale.jsonl"
    stale.write_text(json.dumps(wrong | {"key": "of another source"}) + "\n")
    arguments = ("--variant", "blocks of 16", "--target", "sm_90", "--known", str(stale))
    assert compile_table(*arguments) == [row]


def recorded_rows() -> list[dict]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()]


def test_fp8_is_vllms_format_and_does_not_compile_below_8_9() -> None:
    """What startup/refusals.py refuses: vLLM hands over e4m3, which sm_80 does not convert."""
    from vllm_sepllm.bench.gpus import TARGETS

    assert {target.fp8 for target in TARGETS.values()} == {None, "fp8e4nv", "fp8e4b8"}
    code = (
        "from dataclasses import replace\n"
        "from vllm_sepllm.bench import compile, variants\n"
        "compile.TARGETS['sm_80'] = replace(compile.TARGETS['sm_80'], fp8='fp8e4nv')\n"
        "(fp8,) = [v for v in variants.VARIANTS if v.name == 'bf16 head 128, fp8 cache']\n"
        "compile.compile_variant(fp8, 'sm_80')"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "fp8e4nv not supported in this architecture" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_refuses_to_report_on_interpreted_kernels() -> None:
    from vllm_sepllm.bench.compile import VARIANTS, compile_variant

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_variant(VARIANTS[0], "sm_90")


def test_occupancy_by_hand() -> None:
    """sm_90: 65536 registers, 228 KiB of which each program loses one, 64 warps."""
    from vllm_sepllm.bench.gpus import TARGETS

    hopper = TARGETS["sm_90"]
    assert hopper.programs_per_sm(registers=128, shared_bytes=0, num_warps=4) == 4
    assert hopper.programs_per_sm(registers=129, shared_bytes=0, num_warps=4) == 3
    assert hopper.programs_per_sm(registers=32, shared_bytes=75 << 10, num_warps=4) == 3
    assert hopper.programs_per_sm(registers=16, shared_bytes=0, num_warps=8) == 8
