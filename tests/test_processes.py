"""A server is waited for, stopped in order, and its failure is shown."""

import sys
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest

from vllm_sepllm.processes import child_environment, run_in_process, serving

# takes --host and --port as vllm serve does, answers every path, and says when it is stopped
SERVER = """
import argparse, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
args = parser.parse_args()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

def stop(*_):
    print("stopped in order", flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, stop)
HTTPServer((args.host, args.port), Handler).serve_forever()
"""


def test_server_answers_inside_and_is_stopped_after(tmp_path: Path) -> None:
    opener = build_opener(ProxyHandler({}))
    log = tmp_path / "log"
    with serving([sys.executable, "-c", SERVER], log, timeout=30) as base_url:
        assert base_url.startswith("http://127.0.0.1:")
        assert opener.open(base_url, timeout=5).read() == b"here"
    assert log.read_text().endswith("stopped in order\n")
    with pytest.raises(OSError, match="refused"):
        opener.open(base_url, timeout=5)


def test_server_is_stopped_when_the_work_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(ZeroDivisionError),
        serving([sys.executable, "-c", SERVER], log, timeout=30),
    ):
        _ = 1 / 0
    assert log.read_text().endswith("stopped in order\n")


def test_server_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(RuntimeError, match=r"the server ended with 1\n(?s:.*)no such model"),
        serving(command, tmp_path / "log", timeout=30),
    ):
        pytest.fail("it never was healthy")


def test_server_that_stays_silent_is_given_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        pytest.raises(RuntimeError, match="did not answer /health in 1 s"),
        serving(command, tmp_path / "log", timeout=1),
    ):
        pytest.fail("it never was healthy")


def test_failed_child_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 1\n(?s:.*)out of blocks"):
        run_in_process(["-c", "raise SystemExit('out of blocks')"], tmp_path / "log")


def test_a_users_setting_wins_and_our_own_command_is_found_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    env = child_environment()
    assert env["HF_HUB_OFFLINE"] == "0"
    assert env["PATH"].startswith(str(Path(sys.executable).parent))
