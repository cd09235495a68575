"""Models that cannot be read: every command says why, and what to do, in a sentence of ours."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Run
from vllm_sepllm.cli.unreadable import unreadable

NO_FOLDER = "there is no such folder; name the one that holds the model's config.json"
NO_CONFIG = "the folder has no config.json; name one that holds a whole model"
NOT_CACHED = "no config.json of it in the Hugging Face cache; check the name, or set HF_HUB_OFFLINE"
PLAN = ("--kv-memory", "1GiB", "--context", "4k")


def plain(text: str) -> str:
    """Without the box that typer draws."""
    return " ".join(text.replace("\u2502", " ").split())


@pytest.fixture(params=["plan", "eval", "show", "separators"])
def answer(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> Any:
    """What a command says of a model that it does not read."""
    text, suite = tmp_path / "text.txt", tmp_path / "suite.yaml"
    text.write_text("A text.")
    suite.write_text(
        json.dumps({"tasks": [{"kind": "text", "files": ["text.txt"], "context": [256]}]})
    )
    options: dict[str, tuple[object, ...]] = {
        "plan": PLAN,
        "eval": (suite, "--output", tmp_path / "out"),
        "show": (text,),
        "separators": (text,),
    }
    return lambda model: plain(run(request.param, model, *options[request.param], code=2))


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "~/nowhere", "no/such/folder"])
def test_a_folder_that_does_not_exist(answer: Any, model: str) -> None:
    said = answer(model)
    assert f"{model!r}: {NO_FOLDER}" in said
    assert "epo id" not in said


def test_a_folder_without_a_model(answer: Any, tmp_path: Path) -> None:
    assert f"{str(tmp_path)!r}: {NO_CONFIG}" in answer(tmp_path)


@pytest.mark.parametrize("model", ["nobody/nothing", "nothing"])
def test_a_name_that_the_cache_has_not(answer: Any, model: str) -> None:
    assert f"{model!r}: there is no such folder, and {NOT_CACHED}" in answer(model)


def test_a_folder_without_a_tokenizer(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    said = plain(run("separators", tmp_path, code=2))
    assert f"no tokenizer in {str(tmp_path)!r}: the folder has no tokenizer_config.json" in said


def test_another_reason_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "model type `unheard-of`" in plain(run("plan", tmp_path, *PLAN, code=2))
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "no tokenizer in" in (said := plain(run("separators", tmp_path, code=2)))
    assert "the folder has no" not in said


class _Hub(BaseHTTPRequestHandler):
    """Hugging Face as it answers to those who may not see a model."""

    def do_HEAD(self) -> None:
        is_gated = "/owner/gated/" in self.path
        self.send_response(401 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def online(endpoint: str, tmp_path: Path, *arguments: str) -> str:
    """What a process of its own prints: HF_HUB_OFFLINE is read once."""
    own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    return plain(done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("owner/gated", "accept the terms on its page and log in with `hf auth login`"),
        ("owner/none", "no such model on Hugging Face unless it is private; check the name"),
    ],
)
def test_what_hugging_face_does_not_show(
    hub: str, model: str, message: str, tmp_path: Path
) -> None:
    assert message in online(hub, tmp_path, "-m", "vllm_sepllm", "plan", model, *PLAN)


def test_no_network(tmp_path: Path) -> None:
    """Without the command, in which transformers tries again for half a minute."""
    code = f"import {unreadable.__module__} as m; print(m.unreadable('owner/none', 'config.json'))"
    # nobody listens on port 9, where data is discarded
    said = online("http://127.0.0.1:9", tmp_path, "-c", code)
    assert said.endswith("nor is Hugging Face reached; check the network, or name a folder")
