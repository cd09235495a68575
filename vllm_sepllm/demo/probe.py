"""Probe of a vLLM engine in its own process: which requests run, what KV cache they hold."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(slots=True)
class Usage:
    """The most that was seen so far.

    Attributes:
        num_blocks: blocks in the pool, all layers of one block counted once.
        num_running: requests that held KV cache at the same time.
        blocks: request id -> blocks held.
        block_bytes: bytes of one block over all layers.
    """

    num_blocks: int
    block_bytes: int
    num_running: int = 0
    blocks: dict[str, int] = field(default_factory=dict)


class Probe:
    """Reads the scheduler after each of its steps and prints a line every few seconds.

    Needs ``VLLM_ENABLE_V1_MULTIPROCESSING=0``: with it, the scheduler of ``llm`` is an
    object of this process. It reads only, and it reads right after ``schedule()``, when
    the step's blocks are allocated and no request of the step is finished yet.
    """

    def __init__(self, llm: "LLM", seconds_between_lines: float = 5.0) -> None:
        core: Any = llm.llm_engine.engine_core  # the in-process client has the engine
        self._scheduler = core.engine_core.scheduler
        config = self._scheduler.kv_cache_config
        groups = config.kv_cache_groups
        page_bytes = [len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups]
        self.usage = Usage(config.num_blocks, max(page_bytes))
        self._pause = seconds_between_lines
        self._next_line = 0.0
        self._schedule = self._scheduler.schedule
        self._scheduler.schedule = self._schedule_and_look

    def _schedule_and_look(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        usage, running = self.usage, self._scheduler.running
        usage.num_running = max(usage.num_running, len(running))
        for request in running:
            groups = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
            held = sum(len(block_ids) for block_ids in groups)
            before = usage.blocks.get(request.request_id, 0)
            usage.blocks[request.request_id] = max(before, held)
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._pause
            self._print_line(running)
        return output

    def _print_line(self, running: list[Any]) -> None:
        states = [
            f"prompt {100 * r.num_computed_tokens // r.num_prompt_tokens} %"
            if r.num_computed_tokens < r.num_prompt_tokens
            else f"answer {r.num_output_tokens}"
            for r in running
        ]
        waiting = len(self._scheduler.waiting)
        print(f"  {len(running)} running, {waiting} waiting: {', '.join(states)}", flush=True)
