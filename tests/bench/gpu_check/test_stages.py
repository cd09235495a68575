"""What each kind of machine runs, and what vLLM makes of the arguments on an H100."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.cuda_configuration import configured
from tests.support.tiny_models import write
from vllm_sepllm.bench.gpu_check.stage import Answers, arguments_of, path_faults, rounds_of
from vllm_sepllm.bench.gpu_check.stages import (
    ACCEPTED,
    CACHED,
    DRAFTED,
    PREEMPTIONS,
    STAGES,
    Asked,
    Machine,
    left_out,
)
from vllm_sepllm.bench.side import COUNTERS

BY_NAME = {stage.name: stage for stage in STAGES}
H100 = Machine("cuda", (9, 0), num_gpus=1, has_flashinfer=True)


def runs_on(machine: Machine) -> set[str]:
    return {stage.name for stage in STAGES if left_out(stage, machine) is None}


def test_what_machines_run() -> None:
    everywhere = {
        "operations",
        "exactness",
        "prefix-hits",
        "preemption",
        "host-memory",
        "positions",
    }
    assert runs_on(Machine("cpu")) == everywhere | {"eager-cpu"}
    on_amd = everywhere | {"eager-triton", "graphs-triton", "compiled", "fp8", "speculative"}
    assert runs_on(Machine("rocm", (9, 4), 1)) == on_amd
    on_h100 = on_amd | {f"{way}-{name}" for way in ("eager", "graphs") for name in ("flash",)}
    assert runs_on(Machine("cuda", (9, 0), 1)) == on_h100
    assert runs_on(H100) == on_h100 | {"eager-flashinfer", "graphs-flashinfer"}
    assert runs_on(Machine("cuda", (9, 0), 2)) == on_h100 | {"tensor-parallel"}
    assert runs_on(Machine("cuda", (8, 0), 1)) == on_h100 - {"fp8"}


def test_every_reason_says_what_is_missing() -> None:
    cpu = {stage.name: left_out(stage, Machine("cpu")) for stage in STAGES}
    assert cpu["compiled"] == "needs a GPU, and torch sees none"
    assert cpu["fp8"] == "sepllm refuses a quantised KV cache on CPUs"
    assert left_out(BY_NAME["tensor-parallel"], H100) == "needs two GPUs, and torch sees 1"
    assert left_out(BY_NAME["eager-cpu"], H100) == "for machines without a GPU"


def test_prompts_are_the_same_each_time_and_what_the_stage_says() -> None:
    asked = Asked((50, 7), is_again=True)
    first, second = rounds_of(asked)
    assert [first, second] == rounds_of(asked)
    assert [len(prompt) for prompt in first] == [50, 7]
    assert [prompt[:7] for prompt in second] == [prompt[:7] for prompt in first]
    assert all(len(long) - len(short) > 60 for long, short in zip(second, first, strict=True))
    (repetitive,) = rounds_of(Asked((50,), is_repetitive=True))
    assert repetitive[0][-40:] == repetitive[0][10:50]


def test_what_proves_a_stage_is_counted() -> None:
    assert {stage.proof for stage in STAGES} - {None, CACHED} <= {*COUNTERS}


def answers(counters: dict[str, int], **parts: str) -> Answers:
    return Answers([], [], counters, {"graphs": "NONE"} | parts)


def test_a_path_that_did_not_run_is_a_fault() -> None:
    hits, drafts = BY_NAME["prefix-hits"], BY_NAME["speculative"]
    assert path_faults(hits, answers({CACHED: 5}), H100) == []
    assert path_faults(hits, answers({CACHED: 0}), H100) == [
        f"nothing of the kind happened: no {CACHED}"
    ]
    assert path_faults(BY_NAME["preemption"], answers({PREEMPTIONS: 1}), H100) == []
    (said,) = path_faults(drafts, answers({DRAFTED: 9, ACCEPTED: 0}), H100)
    assert "(9 tokens were drafted)" in said
    triton = answers({}, backend="SepLLMTritonAttentionBackend")
    assert path_faults(BY_NAME["eager-triton"], triton, H100) == []
    assert path_faults(BY_NAME["eager-flash"], triton, H100) == [
        "layers ran SepLLMTritonAttentionBackend, not FLASH_ATTN"
    ]
    assert path_faults(BY_NAME["compiled"], triton, H100) == ["no CUDA graph was captured"]
    assert path_faults(BY_NAME["compiled"], answers({}, graphs="FULL"), H100) == []


@pytest.mark.slow
def test_vllm_takes_every_stage_on_an_h100(tmp_path: Path) -> None:
    """Proves names and values of all arguments; two GPUs alone are not there to be asked."""
    pytest.importorskip("vllm")
    stages = [s for s in STAGES if s.asked is not None and left_out(s, H100) is None]
    model = {"model": str(write("llama", tmp_path))}
    jobs: list[dict[str, Any]] = []
    for stage in stages:
        for side in ("stock", "sepllm"):
            given = arguments_of(stage, side, "bfloat16", H100) | model
            chosen = {"attention_backend": "sepllm"} if side == "sepllm" else {}
            jobs.append(given | chosen)
    found = configured(tmp_path / "cache", *jobs)
    for stage, stock, sepllm in zip(stages, found[::2], found[1::2], strict=True):
        assert "refusal" not in stock | sepllm, (stage.name, stock, sepllm)
        assert "SepLLM" in sepllm["worker"]
        assert stock["graphs"] == sepllm["graphs"]
        assert (stock["graphs"] != "NONE") is stage.has_graphs, stage.name
        if stage.backend is not None:
            assert stage.backend in stock["backend"]
            assert stage.backend in sepllm["backend"]
