"""Child processes of demo, benchmarks and tests: one engine a process, logs in files."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

HOST = "127.0.0.1"
STOP_SECONDS = 60


def child_environment(*, spin: bool = False) -> dict[str, str]:
    """Environment of a child: no hub, no usage report, no proxy to ourselves, logs on stderr.

    Args:
        spin: leave it to OpenMP how threads wait; else they sleep.
    """
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        # PyTorch's huge pages: with small ones the engine started first is slower at equal work
        "THP_MEM_ALLOC_ENABLE": "1",
        "NO_PROXY": HOST,
        "no_proxy": HOST,
    }
    if not spin:  # beside a busy neighbour threads that spin cost 2.5 times the time
        defaults["OMP_WAIT_POLICY"] = "passive"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return defaults | os.environ | {"PATH": path}


def engine_environment(*, spin: bool = False) -> dict[str, str]:
    """Environment of a child that is an engine itself, with no process of a front end's."""
    # such an engine uses one thread unless it is told otherwise
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return threads | child_environment(spin=spin) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def run_in_process(command: Sequence[str], log: Path) -> None:
    """Run a module with an engine in its own process; its standard output stays visible.

    Raises:
        RuntimeError: if it fails, with the end of its log.
    """
    with log.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, *command], env=engine_environment(), stderr=stderr, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}\n{tail(log)}")


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that is over.

    Attributes:
        seconds: that it ran.
        code: its exit status; None: its time was over and it was killed.
    """

    seconds: float
    code: int | None


def run_limited(command: Sequence[str], log: Path, limit: float) -> Ended:
    """Run a command that may hang; after ``limit`` seconds it and what it started are killed.

    Its output goes to ``log``. The same happens if we are interrupted.
    """
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=engine_environment(spin=True),
            start_new_session=True,
        )
        code = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                # its own session: the group holds what it started, engines and their workers
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(time.monotonic() - start, code)


@contextmanager
def serving(command: Sequence[str], log: Path, timeout: float) -> Iterator[str]:
    """Run an API server on a free port of this machine and yield the API's base URL.

    On leaving, the server is asked to stop (SIGTERM) and waited for.

    Args:
        command: ``vllm serve MODEL ...`` or what takes the same ``--host`` and ``--port``.
        log: file that its output goes to.
        timeout: seconds until it must answer /health.

    Raises:
        RuntimeError: if it ends early, does not answer in time or has to be killed, with
            the end of its log.
    """
    port = free_port()
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdout=file,
            stderr=file,
            env=child_environment(),
            # a session of its own: Ctrl-C reaches us alone, and we stop the server in order
            start_new_session=True,
        )
    try:
        _wait_for_health(server, port, log, timeout)
        yield f"http://{HOST}:{port}/v1"
    finally:
        _stop(server, log)


def _wait_for_health(server: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    opener = build_opener(ProxyHandler({}))
    start = next_line = time.monotonic()
    while (now := time.monotonic()) < start + timeout:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}\n{tail(log)}")
        try:
            with opener.open(f"http://{HOST}:{port}/health", timeout=5):
                print(f"  healthy after {now - start:.0f} s", flush=True)
                return
        except OSError:
            if now >= next_line:
                next_line += 10
                print(f"  starting, {now - start:.0f} s", flush=True)
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer /health in {timeout:.0f} s\n{tail(log)}")


def _stop(server: subprocess.Popen[bytes], log: Path) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        # its own session: no process but the server's is in the group
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        raise RuntimeError(
            f"the server did not stop in {STOP_SECONDS} s and was killed\n{tail(log)}"
        ) from None


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
    return port


def tail(log: Path, num_lines: int = 30) -> str:
    """The last lines of a log, under its name."""
    lines = log.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"the end of {log}:", *lines])
