"""A prefill instance in a process of its own, for tests whose process is the decode instance.

``python -m tests.support.prefill_instance JSON``: arguments of vllm.LLM. A line of standard input
is a list of [prompt, extra_args], the answer a line with each one's kv_transfer_params.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.engine import IN_PROCESS

ROOT = Path(__file__).resolve().parents[2]
MARK = "PARAMS "
REMOTE = {"do_remote_decode": True, "do_remote_prefill": False}


class PrefillInstance:
    """The process, seen from the test's."""

    def __init__(self, log: Path, environment: dict[str, str], **arguments: Any) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.prefill_instance", json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=os.environ | IN_PROCESS | environment,
            )

    def wait(self) -> Any:
        """The next answer; the first one says that the engine runs."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise AssertionError(self.log.read_text()[-4000:])

    def prefill(
        self, prompts: list[list[int]], choices: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """extra_args for the decode instance, of each prompt."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([*zip(prompts, choices, strict=True)]) + "\n")
        self.process.stdin.flush()
        answers = self.wait()
        return [
            {**choice, "kv_transfer_params": params}
            for choice, params in zip(choices, answers, strict=True)
        ]


@contextmanager
def prefill_instance(
    log: Path, environment: dict[str, str], **arguments: Any
) -> Iterator[PrefillInstance]:
    """The instance, which may still be starting; killed afterwards."""
    instance = PrefillInstance(log, environment, **arguments)
    try:
        yield instance
    finally:
        instance.process.kill()
        instance.process.wait()


def _answer(params: Any) -> None:
    print(f"\n{MARK}{json.dumps(params)}", flush=True)


def main() -> None:
    """Serve until standard input ends."""
    from vllm import LLM, SamplingParams

    from tests.support import process_memory

    process_memory.install()
    llm = LLM(**json.loads(sys.argv[1]))
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in sys.stdin], daemon=True)
    reader.start()
    _answer("ready")
    while reader.is_alive() or not lines.empty():
        try:
            line = lines.get(timeout=0.01)
        except queue.Empty:
            if scheduler.has_requests():  # states that nobody has read yet
                engine.step()
            continue
        asked = json.loads(line)
        parameters = [
            SamplingParams(max_tokens=1, extra_args={**choice, "kv_transfer_params": REMOTE})
            for _, choice in asked
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
        answers = llm.generate(prompts, parameters, use_tqdm=False)
        _answer([answer.kv_transfer_params for answer in answers])


if __name__ == "__main__":
    main()
