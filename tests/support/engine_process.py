"""What an engine is made of, in whatever processes its parts live.

``python -m tests.support.engine_process JSON`` prints it as JSON for an engine of its own: {"llm":
arguments of vllm.LLM, "prompts": lists of token ids, "num_new_tokens": of each answer}.
"""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "REPORT "
# lets :func:`report_of` send its question to workers in processes of their own
MAY_ASK = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@dataclass(frozen=True)
class Report:
    """What an engine is made of.

    Attributes:
        knows_sepllm: whether the plugin was loaded.
        config: field of VllmConfig -> its repr.
        scheduler: class of the scheduler.
        workers: class of each rank's worker.
        layers: layer -> class of its implementation, class of its backend, KV cache spec.
        tokens: greedy continuation of each prompt.
        log: everything the processes wrote.
    """

    knows_sepllm: bool
    config: dict[str, str]
    scheduler: str
    workers: list[str]
    layers: dict[str, list[str]]
    tokens: list[list[int]]
    log: str = ""


def run(environment: dict[str, str], **job: Any) -> Report:
    """Start the engine in a new process with ``environment`` on top of ours."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.engine_process", json.dumps(job)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return Report(**json.loads(line.removeprefix(MARK)), log=log)


def _look(worker: Any) -> tuple[str, dict[str, list[str]]]:
    """Runs inside the worker."""
    layers = worker.vllm_config.compilation_config.static_forward_context
    specs = worker.get_kv_cache_spec()
    found = {
        name: [type(layer.impl).__name__, layer.attn_backend.__name__, repr(specs[name])]
        for name, layer in layers.items()
    }
    # vLLM hands over its wrapper
    return type(worker.worker).__name__, found


def report_of(llm: Any, prompts: list[list[int]], num_new_tokens: int) -> Report:
    """Ask the engine and look at it."""
    from vllm import SamplingParams
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True),
        use_tqdm=False,
    )
    config = llm.llm_engine.vllm_config
    ranks = llm.collective_rpc(_look)
    return Report(
        knows_sepllm="SEPLLM" in AttentionBackendEnum.__members__,
        config={f.name: repr(getattr(config, f.name)) for f in dataclasses.fields(config)},
        scheduler=config.scheduler_config.get_scheduler_cls().__name__,
        workers=[worker for worker, _ in ranks],
        layers={name: found for _, layers in ranks for name, found in layers.items()},
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
    )


def print_report(job: dict[str, Any]) -> None:
    """Start an engine, print what it is made of, and stop it."""
    from vllm import LLM

    llm = LLM(**job["llm"])
    report = report_of(llm, job["prompts"], job["num_new_tokens"])
    fields = dataclasses.asdict(report)
    del fields["log"]
    print(f"\n{MARK}{json.dumps(fields)}", flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    print_report(json.loads(sys.argv[1]))
