"""The engines of a comparison, each in a process of its own, driven in turn."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_sepllm.processes import engine_environment, tail

# arguments of all sides; those of one side are in _DIFFERENCES
_DEFAULTS: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": False, "seed": 0}
_DIFFERENCES: dict[str, dict[str, Any]] = {
    "stock": {},
    "sepllm": {"attention_backend": "sepllm"},
    "streaming-llm": {
        "attention_backend": "sepllm",
        "additional_config": {"sepllm": {"preset": "streaming-llm"}},
    },
    # all separators, nearly as in the paper
    "extended": {
        "attention_backend": "sepllm",
        "additional_config": {"sepllm": {"separators": "extended", "window": 252}},
    },
    # the default until December 2026; texts here have fewer
    "all-sentences": {
        "attention_backend": "sepllm",
        "additional_config": {"sepllm": {"max_separators": 8192}},
    },
}
SIDES = tuple(_DIFFERENCES)
USUAL_SIDES = SIDES[:3]


def server_flags(side: str) -> list[str]:
    """Flags of ``vllm serve`` for the side, besides those that all sides share."""
    flags = []
    for key, value in _DIFFERENCES[side].items():
        text = value if isinstance(value, str) else json.dumps(value)
        flags += ["--" + key.replace("_", "-"), text]
    return flags


class SideProcess:
    """An engine that waits for commands."""

    def __init__(self, name: str, process: subprocess.Popen[str], answers: Any, log: Path) -> None:
        self.name = name
        self._process = process
        self._answers = answers
        self._log = log

    def wait(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: if the process has ended, with the end of its log.
        """
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the engine of {self.name} ended; {tail(self._log, 20)}")
        return json.loads(line)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the process run inside, and stand still outside: its threads may poll."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def do(self, command: str, **arguments: Any) -> Any:
        """Have a method of :class:`vllm_sepllm.bench.side.Side` run, alone on the machine."""
        assert self._process.stdin is not None, "opened with a pipe"
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self.wait()


def arguments_of(side: str, model: str, common: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``; the sides differ in the backend alone."""
    return {"model": model, **_DEFAULTS, **_DIFFERENCES[side], **common}


@contextmanager
def running(
    names: list[str],
    model: str,
    common: dict[str, Any],
    logs: Path,
    own: dict[str, dict[str, Any]] | None = None,
) -> Iterator[dict[str, SideProcess]]:
    """Start the engines one after the other; on leaving they end, and are waited for.

    Args:
        names: of the sides.
        model: folder, or name in the cache.
        common: arguments of all sides.
        logs: folder.
        own: side -> arguments of this side alone.
    """
    with ExitStack() as stack:
        sides = {}
        for name in names:
            Console(stderr=True).print(f"starting {name}")
            given = arguments_of(name, model, common) | (own or {}).get(name, {})
            sides[name] = stack.enter_context(started(name, given, logs))
        yield sides


@contextmanager
def started(
    name: str,
    arguments: dict[str, Any],
    logs: Path,
    environment: dict[str, str] | None = None,
) -> Iterator[SideProcess]:
    """Start an engine; on leaving it ends, and is waited for.

    Args:
        name: of its log.
        arguments: of ``vllm.LLM``.
        logs: folder.
        environment: on top of ours.
    """
    read, write = os.pipe()
    log = logs / f"{name}.log"
    with log.open("w") as output, os.fdopen(read) as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_sepllm.bench.side", str(write), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[write],
            # sides take turns, so threads that spin are in nobody's way
            env=engine_environment(spin=True) | (environment or {}),
            text=True,
        )
        os.close(write)
        try:
            side = SideProcess(name, process, answers, log)
            side.wait()
            yield side
        finally:
            assert process.stdin is not None, "opened with a pipe"
            process.send_signal(signal.SIGCONT)
            process.stdin.close()
            process.wait()
