"""One stage in a process of its own: ``python -m vllm_sepllm.bench.gpu_check.stage JOB``.

JOB is a :class:`Job` as JSON. What was found is written to its ``result`` as JSON; engines are
processes of this one, with logs beside it. Stock vLLM runs first, then sepllm, then the oracle.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_sepllm.bench.gpu_check.model import SEPARATORS, prompts
from vllm_sepllm.bench.gpu_check.oracle import Oracle
from vllm_sepllm.bench.gpu_check.stages import (
    CACHED,
    CLASSES,
    DRAFTED,
    STAGES,
    Asked,
    Machine,
    Stage,
    this_machine,
)
from vllm_sepllm.bench.gpu_check.verdict import errors_of, faults_of
from vllm_sepllm.bench.sides import SideProcess, running
from vllm_sepllm.policy.visibility import Policy

KV_BYTES = {"cuda": 2 << 30, "rocm": 2 << 30, "cpu": 256 << 20}
REPEATED = 40  # tokens with which a repetitive prompt ends once more
CONTINUED = 70  # tokens that a second round adds: more than a window
MOST_KERNEL_ERROR = 2.0  # times that of rounding the result


@dataclass(frozen=True, slots=True)
class Job:
    """What the process is told.

    Attributes:
        stage: its name.
        model: folder.
        dtype: of the model, unless the stage has its own.
        result: file to write.
    """

    stage: str
    model: str
    dtype: str
    result: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What a side answered, round after round.

    Attributes:
        token_ids: of each request.
        logprobs: of each request's tokens.
        counters: vLLM's, and CACHED.
        parts: see :func:`vllm_sepllm.integration.rigs.parts.parts_of`.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    counters: dict[str, int]
    parts: dict[str, str]


def rounds_of(asked: Asked) -> list[list[list[int]]]:
    """Prompts of each round."""
    first = prompts(asked.lengths, seed=0)
    if asked.is_repetitive:
        first = [prompt + prompt[-REPEATED:] for prompt in first]
    if not asked.is_again:
        return [first]
    more = prompts((CONTINUED,) * len(first), seed=1)
    return [first, [prompt + extra for prompt, extra in zip(first, more, strict=True)]]


def arguments_of(stage: Stage, side: str, dtype: str, machine: Machine) -> dict[str, Any]:
    """Of vllm.LLM, besides the model and what all sides of a benchmark have."""
    given: dict[str, Any] = {
        "dtype": stage.dtype or dtype,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_model_len": 4096,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 1024,
        "kv_cache_memory_bytes": KV_BYTES[machine.kind],
    }
    if machine.kind != "cpu":
        # of memory that must be free at the start; how much is used is said in bytes
        given["gpu_memory_utilization"] = 0.1
    # vLLM has one attention backend on CPUs
    backend = None if machine.kind == "cpu" else stage.backend
    if side == "stock":
        own: dict[str, Any] = {} if backend is None else {"attention_backend": backend}
    else:
        settings: dict[str, Any] = asdict(stage.policy) | {"separators": list(SEPARATORS)}
        if stage.policy.max_position is not None:
            settings["positions"] = "renumbered"
        if backend is not None:
            settings["decode_backend"] = backend
        own = {"additional_config": {"sepllm": settings}} | stage.own
    return given | stage.arguments | own


def ask(side: SideProcess, asked: Asked) -> Answers:
    """Every round, one after the other."""
    answered = [
        side.do("generate", prompts=sent, max_tokens=asked.max_tokens, logprobs=True)
        for sent in rounds_of(asked)
    ]
    counters = dict(side.do("counters"))
    # a hit in the first round is one among its own prompts, which share nothing
    counters[CACHED] = sum(answered[-1]["num_cached_tokens"])
    return Answers(
        token_ids=[ids for found in answered for ids in found["token_ids"]],
        logprobs=[values for found in answered for values in found["logprobs"]],
        counters=counters,
        parts=dict(side.do("parts")),
    )


def path_faults(stage: Stage, sepllm: Answers, machine: Machine) -> list[str]:
    """What did not run although the stage is about it."""
    faults = []
    if stage.proof is not None and not sepllm.counters.get(stage.proof):
        drafted = sepllm.counters.get(DRAFTED)
        hint = "" if drafted is None else f" ({drafted} tokens were drafted)"
        faults.append(f"nothing of the kind happened: no {stage.proof}{hint}")
    backend = sepllm.parts.get("backend", "")
    if machine.kind != "cpu" and stage.backend and backend != f"SepLLM{CLASSES[stage.backend]}":
        faults.append(f"layers ran {backend or 'an unknown backend'}, not {stage.backend}")
    if stage.has_graphs and sepllm.parts["graphs"] == "NONE":
        faults.append("no CUDA graph was captured")
    return faults


def engines(stage: Stage, job: Job, machine: Machine) -> dict[str, Any]:
    """Both engines, one after the other, then the oracle: what was measured, and faults."""
    assert stage.asked is not None, "stages without requests have no engine"
    model, folder = Path(job.model), Path(job.result).parent
    answers = {}
    for side in ("stock", "sepllm"):
        logs = folder / f"{stage.name}-{side}"
        logs.mkdir(exist_ok=True)
        given = arguments_of(stage, side, job.dtype, machine)
        with running([side], job.model, given, logs) as started:
            answers[side] = ask(started[side], stage.asked)
    oracle = Oracle(model, SEPARATORS)
    # what an engine would show that did nothing: forgot nothing, or kept the text's positions
    idle = None if stage.policy.max_position is None else replace(stage.policy, max_position=None)
    sent = [prompt for each in rounds_of(stage.asked) for prompt in each]

    def errors(side: str, policy: Policy | None) -> Any:
        found = zip(sent, answers[side].token_ids, answers[side].logprobs, strict=True)
        return errors_of(
            (logprobs, oracle.scores(prompt, token_ids, policy))
            for prompt, token_ids, logprobs in found
        )

    measured = {
        "stock": errors("stock", None),
        "sepllm": errors("sepllm", stage.policy),
        "control": errors("sepllm", idle),
    }
    faults = [
        *path_faults(stage, answers["sepllm"], machine),
        *faults_of(measured["stock"], measured["sepllm"], measured["control"]),
    ]
    found = {name: asdict(value) for name, value in measured.items()}
    counters, parts = answers["sepllm"].counters, answers["sepllm"].parts
    return {"errors": found, "counters": counters, "parts": parts, "faults": faults}


def operations(machine: Machine) -> dict[str, Any]:
    """vLLM's compiled operations, and on a GPU our kernels beside torch in float32."""
    # not at the top: vLLM takes seconds to import, and the kernels need a GPU's Triton
    from vllm_sepllm.integration.rigs.parts import flash_attention_version, rms_norm_error

    error = rms_norm_error()
    faults = [] if error < 0.05 else [f"vLLM's rms_norm is off by {error:.3g}"]
    found: dict[str, Any] = {"rms_norm_error": error}
    if machine.kind == "cpu":
        return found | {"kernels": "left out: they are for GPUs", "faults": faults}
    if machine.kind == "cuda":
        found["flash_attention"] = flash_attention_version()
    from vllm_sepllm.bench.kernels import check

    found["kernels"] = list(check())
    for row in found["kernels"]:
        limit = MOST_KERNEL_ERROR * row["error_of_rounding_alone"]
        if not row["relative_error"] <= limit:
            faults.append(f"prefill kernel, {row['model']}, {row['dtype']}: {row}")
    return found | {"faults": faults}


def main() -> None:
    """Run the stage and write what it found."""
    job, machine = Job(**json.loads(sys.argv[1])), this_machine()
    (stage,) = [stage for stage in STAGES if stage.name == job.stage]
    found = operations(machine) if stage.asked is None else engines(stage, job, machine)
    Path(job.result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
