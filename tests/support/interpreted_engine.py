"""The GPU path on a machine without a GPU: engines whose kernels Triton's interpreter runs.

:class:`Engines` starts this module as a process of its own, which reads a job a line and prints a
report for each. vLLM's CPU platform gets Model Runner V2, the Triton attention backend instead of
its own, and our GPU worker. What is replaced is the device alone: spec, manager, scheduler,
builder, layers and kernels are the GPU's.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "REPORT "
# what the process answers at the moment
_JOB: dict[str, Any] = {}


@dataclass(frozen=True)
class Round:
    """Answers to prompts that were submitted together.

    Attributes:
        tokens: greedy continuation of each prompt.
        logprobs: their log-probabilities.
        num_cached_tokens: of each prompt.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    num_cached_tokens: list[int]


@dataclass(frozen=True)
class Report:
    """What the engine answered.

    Attributes:
        rounds: answers.
        classes: part of the engine -> name of its class.
        num_preemptions: how often a request was sent back to the queue.
        num_accepted: drafted tokens that were right.
    """

    rounds: list[Round]
    classes: dict[str, str]
    num_preemptions: int
    num_accepted: int


class Engines:
    """A process that runs one engine after the other; what they need is imported once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def _alive(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TORCHDYNAMO_DISABLE": "1",  # inductor would ask for the Triton driver
            "TRITON_INTERPRET": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.interpreted_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        return self._process

    def run(self, rounds: list[list[list[int]]], max_tokens: int, **options: Any) -> Report:
        """Answer prompts with an engine of their own.

        Args:
            rounds: token ids of the prompts, one round after the other.
            max_tokens: of each answer.
            options: ``llm``: arguments of vllm.LLM; ``runner``: "v1" or "v2"; ``asynchronous``:
                with asynchronous scheduling; ``choices``: extra_args of the prompts of each round.

        Raises:
            AssertionError: if the engine failed, with what it wrote.
        """
        process = self._alive()
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"rounds": rounds, "max_tokens": max_tokens} | options
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        log = []
        for line in process.stdout:
            if line.startswith(MARK):
                report = json.loads(line.removeprefix(MARK))
                return Report(**report | {"rounds": [Round(**r) for r in report["rounds"]]})
            log.append(line)
        raise AssertionError("".join(log))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _pretend() -> None:
    """Make vLLM's CPU platform run the GPU path; before vllm.triton_utils is imported."""
    import torch
    import triton.backends
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    @cache
    def patch_once(function: Any) -> Any:
        """For good: it took a fifth of the time, at every call of a kernel or of its helpers."""
        patch_language(function)
        return interpreter._LangPatchScope()  # which has nothing to restore

    interpreter._patch_lang = patch_once
    # asked for launch parameters by vLLM's Triton kernels
    torch.cuda.get_device_capability = lambda device=None: (8, 0)

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Backend:
        driver = Driver
        compiler = None

    # vLLM imports Triton only where Triton has a backend for the platform
    triton.backends.backends["cpu"] = Backend

    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # one program a request and head instead of sixteen, or a token takes seconds
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0
    register_backend(
        AttentionBackendEnum.CPU_ATTN,
        "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
    )
    update = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        update(vllm_config)
        vllm_config.scheduler_config.async_scheduling = bool(_JOB.get("asynchronous"))

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)

    from vllm.v1.worker.gpu.spec_decode.ngram import speculator

    speculator._ngram_finalize_kernel = _FinishDrafts()

    from vllm_sepllm.integration.startup import refusals, selection

    selection._CPU_WORKER = "tests.support.interpreted_worker.InterpretedWorker"
    refusals._parallel_reasons = lambda vllm_config: []


class _FinishDrafts:
    """Stands in for vLLM's ``_ngram_finalize_kernel``, whose masks the interpreter refuses."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self._run

    @staticmethod
    def _run(
        token_ids: Any, _stride: int, idx_mapping: Any, total_len: Any, num_sampled: Any,
        last_sampled: Any, scratch: Any, _scratch_stride: int, drafts: Any, max_model_len: int,
        num_blocks: int, num_drafts: int, *_powers: int, **_options: int,
    ) -> None:  # fmt: skip
        for row, request in enumerate(idx_mapping.tolist()):
            drafts[row] = last_sampled[request]
            score = int(scratch[row, :num_blocks].max())
            if score == 0 or int(num_sampled[row]) == 0:
                continue
            length, position = divmod(score - 1, max_model_len + 1)
            start = position + length
            found = token_ids[request, start : min(start + num_drafts, int(total_len[request]))]
            drafts[row, : len(found)] = found


def _answer(job: dict[str, Any]) -> None:
    """Print the report of one job."""
    from tests.support.engine import started

    _JOB.clear()
    _JOB.update(job)
    runner = {"VLLM_USE_V2_MODEL_RUNNER": "1" if job.get("runner", "v2") == "v2" else "0"}
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "disable_log_stats": True,
        "seed": 0,
    }
    with started(runner, **(defaults | job["llm"])) as llm:
        print("\n" + MARK + json.dumps(_report(llm, job)), flush=True)


def _report(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    core = llm.llm_engine.engine_core.engine_core
    scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
    layer = next(iter(worker.vllm_config.compilation_config.static_forward_context.values()))
    preempted: dict[str, int] = {}
    accepted = [0]
    original, update = scheduler.schedule, scheduler.update_from_output

    def schedule(*args: Any) -> Any:
        for request in scheduler.requests.values():
            preempted[request.request_id] = request.num_preemptions
        return original(*args)

    def update_from_output(scheduled: Any, output: Any) -> Any:
        drafted = scheduled.scheduled_spec_decode_tokens
        for row, name in enumerate(output.req_ids):
            if drafted.get(name):
                accepted[0] += max(0, len(output.sampled_token_ids[row]) - 1)
        return update(scheduled, output)

    scheduler.schedule, scheduler.update_from_output = schedule, update_from_output
    choices = job.get("choices") or [[None] * len(prompts) for prompts in job["rounds"]]
    answers = [
        _round(llm.generate(_prompts(r), _sampling(job["max_tokens"], c), use_tqdm=False))
        for r, c in zip(job["rounds"], choices, strict=True)
    ]
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks were not given back"
    return {
        "rounds": answers,
        "classes": {
            "scheduler": type(scheduler).__name__,
            "runner": f"{type(worker.model_runner).__module__}",
            "impl": type(layer.impl).__name__,
            "backend": layer.attn_backend.__name__,
        },
        "num_preemptions": sum(preempted.values()),
        "num_accepted": accepted[0],
    }


def _sampling(max_tokens: int, choices: list[dict[str, Any] | None]) -> list[Any]:
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0}
    return [SamplingParams(**greedy, detokenize=False, extra_args=own) for own in choices]


def _prompts(token_ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in token_ids]


def _round(outputs: list[Any]) -> dict[str, Any]:
    answers = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [at[token].logprob for token, at in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
        "num_cached_tokens": [output.num_cached_tokens or 0 for output in outputs],
    }


if __name__ == "__main__":
    _pretend()
    for line in sys.stdin:
        _answer(json.loads(line))
