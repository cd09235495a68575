"""A real vLLM engine inside the test's process, stepped by hand so that its blocks can be seen."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

# float32: other batch sizes and chunks sum in another order
TOLERANCE = 1e-4
# the engine and its worker share the test's process
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_seqs": 32,
    "seed": 0,
    "disable_log_stats": True,
}


@dataclass
class Answer:
    """What one request got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    num_cached_tokens: int = field(default=0, compare=False)


@dataclass
class Watch:
    """What the scheduler showed while a workload ran.

    Attributes:
        holdings: one (tokens computed, blocks held per KV cache group) for each
            running request after each step.
        max_decoding: most requests that produced a token in the same step.
        num_preemptions: how often a request was sent back to the queue.
    """

    holdings: list[tuple[int, list[int]]] = field(default_factory=list)
    max_decoding: int = 0
    num_preemptions: int = 0
    _preempted: dict[str, int] = field(default_factory=dict)


def sepllm(**config: Any) -> dict[str, Any]:
    """Arguments that select sepllm with ``config``."""
    return {"attention_backend": "sepllm", "additional_config": {"sepllm": config}}


def assert_same(answers: Sequence[Answer], others: Sequence[Answer]) -> None:
    """Same tokens, and log-probabilities within TOLERANCE."""
    for answer, other in zip(answers, others, strict=True):
        assert answer.token_ids
        assert answer.token_ids == other.token_ids
        assert answer.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


class Engine:
    """``vllm.LLM`` with its scheduler at hand."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self._counter = 0

    @property
    def managers(self) -> Sequence[Any]:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def num_blocks(self) -> int:
        """Usable blocks: vLLM keeps one back as the null block."""
        return self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        watch: Watch | None = None,
        max_steps: int | None = None,
        loras: Sequence[Any] | None = None,
        choices: Sequence[Any] | None = None,
        priorities: Sequence[int] | None = None,
        reset_after: int | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Greedy continuations of token-id prompts, all submitted at once.

        ``loras`` has a LoRARequest or None for each prompt, ``choices`` its extra_args or None;
        ``reset_after`` so many steps the prefix cache is emptied, the running requests with it.
        """
        from vllm import SamplingParams

        names = []
        parameters = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "detokenize": False}
        nothing = [None] * len(prompts)
        ranks = priorities or [0] * len(prompts)
        for prompt, lora, choice, priority in zip(
            prompts, loras or nothing, choices or nothing, ranks, strict=True
        ):
            self._counter += 1
            names.append(f"request-{self._counter}")
            self.engine.add_request(
                names[-1],
                {"prompt_token_ids": list(prompt)},
                SamplingParams(max_tokens=max_tokens, extra_args=choice, **(parameters | sampling)),
                lora_request=lora,
                priority=priority,
            )
        finished: dict[str, Any] = {}
        num_steps = 0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            finished |= {o.request_id: o for o in outputs if o.finished}
            if watch is not None:
                self._look(watch, outputs)
            num_steps += 1
            if num_steps == reset_after:
                assert self.llm.reset_prefix_cache(reset_running_requests=True)
            if max_steps is not None and num_steps == max_steps:
                self.engine.abort_request(names, internal=False)
        return [_answer(finished[name]) for name in names if name in finished]

    def _look(self, watch: Watch, outputs: Sequence[Any]) -> None:
        watch.max_decoding = max(watch.max_decoding, len(outputs))
        for request in self.scheduler.requests.values():
            watch._preempted[request.request_id] = request.num_preemptions
        watch.num_preemptions = sum(watch._preempted.values())
        for request in self.scheduler.running:
            held = [len(m.req_to_blocks[request.request_id]) for m in self.managers]
            watch.holdings.append((request.num_computed_tokens, held))


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    answer = Answer(
        token_ids=list(completion.token_ids), num_cached_tokens=output.num_cached_tokens or 0
    )
    if completion.logprobs is not None:
        answer.logprobs = [
            position[token].logprob
            for token, position in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    if output.prompt_logprobs is not None:
        answer.prompt_logprobs = [
            position[token].logprob
            for token, position in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
    return answer


@contextmanager
def engine(path: Path, **arguments: Any) -> Iterator[Engine]:
    """An engine whose scheduler the test can see, gone afterwards.

    Raises:
        AssertionError: if blocks are still held when the test is over.
    """
    with started(IN_PROCESS, model=str(path), **(DEFAULTS | arguments)) as llm:
        made = Engine(llm)
        yield made
        assert made.num_free_blocks == made.num_blocks, "blocks were not given back"
        assert not made.scheduler.requests


@contextmanager
def started(environment: dict[str, str], **arguments: Any) -> Iterator[Any]:
    """``vllm.LLM`` with its front end in this process; all of its processes are gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with patch.dict(os.environ, environment), one_collection():
        if not arguments.get("enforce_eager"):
            os.environ.pop("TORCHDYNAMO_DISABLE", None)
        try:
            llm = LLM(**arguments)
            try:
                yield llm
            finally:
                # vLLM's own timeout is waited for whenever there are processes
                llm.llm_engine.engine_core.shutdown(timeout=0)
                del llm
        finally:
            cleanup_dist_env_and_memory()


@contextmanager
def one_collection() -> Iterator[None]:
    """Garbage is collected once, when all is over, and not among what was imported.

    Start and end of an engine collect nine times, each time over everything that the test process
    has imported: half the time of a small engine. The same goes for a search of all modules for
    kernels, which finds nothing new after the first engine of a process, and for the copies of its
    tokenizer that vLLM makes for threads, which tests do not start.
    """
    _freeze_imports()
    try:
        with patch.multiple(gc, collect=_nothing, freeze=_nothing, unfreeze=_nothing):
            yield
    finally:
        gc.collect()


@cache
def _freeze_imports() -> None:
    from vllm.platforms import current_platform
    from vllm.renderers import hf

    find_kernels = cache(current_platform.register_triton_kernel_overrides)
    type(current_platform).register_triton_kernel_overrides = staticmethod(find_kernels)
    hf.maybe_make_thread_pool = lambda tokenizer, _num_copies: tokenizer
    gc.collect()
    gc.freeze()


def _nothing(*_args: Any) -> int:
    return 0
