"""Ray: engines inside actors, and vLLM's own Ray executor with our plan in its messages."""

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine_process import MARK
from tests.support.oracle import Rule, greedy, log_probabilities
from tests.support.tiny_engine import ENGINE, NUM_TOKENS, check, prompts
from tests.support.tiny_models import SEPARATORS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# what the examples take, which say nothing about the policy
DEFAULTS = Rule(4, 508, frozenset(SEPARATORS), max_separators=256)
NUM_TEXTS = 8
EXECUTOR_VARIABLE = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
FLOAT32 = ("--dtype", "float32")  # as the oracle
# without a network nothing of Ray's can be reached from outside, and with the namespace's first
# process all others end
NAMESPACE = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def namespace() -> list[str]:
    """The command that runs another one in a namespace, without root where the system allows it."""
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            pytest.fail(f"Ray must not listen on this machine's network: install `{program}`")
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, *NAMESPACE]
    tried = subprocess.run(
        [*command, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.fail(
            "Ray must not listen on this machine's network, and no namespace can be made: run as "
            f"root, or allow user namespaces ({tried.stderr.strip()})"
        )
    return command


def word_texts() -> list[str]:
    """Longer than the defaults' window."""
    numbers = random.Random(1)
    names = {7: ".", 11: "?", 13: "!"}
    drawn = [[numbers.randrange(2, 128) for _ in range(620)] for _ in range(NUM_TEXTS)]
    return [" ".join(names.get(i, f"w{i}") for i in ids) for ids in drawn]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(word_texts()):
        (folder / f"{i}.txt").write_text(text)
    rows = [json.dumps({"text": text}) for text in word_texts()]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return sorted(folder.glob("*.txt"))


@pytest.fixture(scope="module")
def report(tiny_llama_path: Path, files: list[Path]) -> Iterator[dict[str, Any]]:
    """Everything, on one cluster: it takes a while to start."""
    pytest.importorskip("ray")
    executor = ENGINE | {
        "model": str(tiny_llama_path),
        "distributed_executor_backend": "ray",
        "enforce_eager": True,
    }
    job = {"prompts": prompts(), "num_new_tokens": NUM_TOKENS}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # pytest's are too long for sockets
        out = str(Path(folder) / "answers")
        lines = str(files[0].parent / "prompts.jsonl")
        model, names = str(tiny_llama_path), [str(file) for file in files]
        # one after the other in one process
        engines = [
            job | {"environment": {EXECUTOR_VARIABLE: version}, "llm": executor | workers}
            for version, workers in (("0", {}), ("1", {"tensor_parallel_size": 2}))
        ]
        parts = {
            "pool": {
                "command": ["examples/ray/actor_pool.py", "2", model, *names, *FLOAT32],
                "files": names,
            },
            "data": {"command": ["examples/ray/batch_data.py", "1", model, lines, out, *FLOAT32]},
            "executors": {"command": ["-m", "tests.support.ray_executor", json.dumps(engines)]},
        }
        path = Path(folder) / "job.json"
        path.write_text(json.dumps({"folder": folder, "parts": parts}))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        # conftest.py has put a folder there
        path_of_children = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])
        inner = f"ip link set lo up && exec {sys.executable} -m tests.support.ray_scenario {path}"
        done = subprocess.run(
            [*namespace(), "bash", "-c", inner],
            env=os.environ | token | {"PYTHONPATH": path_of_children},
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10000:]
        found = json.loads(path.with_suffix(".report").read_text())
        found["data"]["rows"] = [
            json.loads(line) for p in Path(out).glob("*.json") for line in p.open()
        ]
        print({name: round(part["seconds"]) for name, part in found.items()})
        yield found


def check_text(model: Path, text: str, answer: str) -> bool:
    """Proves ``answer`` against the oracle, word by word; whether full attention's is another."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model).encode
    prompt, tokens = encode(text), encode(answer)
    assert len(prompt) == 620
    assert tokens
    assert tokens == greedy(model, prompt, tokens, DEFAULTS)
    if len(tokens) < 32:  # it ended by the end token, which is not part of the text
        assert log_probabilities(model, prompt + tokens, DEFAULTS)[-1].argmax() == 1
    return tokens != greedy(model, prompt, tokens, None)


@pytest.mark.compatibility(
    "Ray: a pool of engines, an engine killed at work", "exact, nothing lost"
)
def test_actor_pool_with_an_engine_that_dies(
    report: dict[str, Any], tiny_llama_path: Path, files: list[Path]
) -> None:
    """Proves that an engine killed at its work is started again, that nothing is lost or said
    twice, and that every answer is exact."""
    pool = report["pool"]
    assert pool["returncode"] == 0
    assert len(pool["engines_before"]) == 2
    assert pool["victim"] in pool["engines_before"]
    assert set(pool["engines_seen"]) - set(pool["engines_before"]), "none was started again"
    assert [file for file, _ in pool["answers"]] == list(map(str, files))
    unlike_full = [
        check_text(tiny_llama_path, Path(f).read_text(), answer) for f, answer in pool["answers"]
    ]
    assert any(unlike_full)


@pytest.mark.compatibility("Ray Data batch job", "exact")
def test_batch_job(report: dict[str, Any], tiny_llama_path: Path) -> None:
    """Proves that Ray Data's workers each hold an engine with sepllm, and exact answers."""
    data = report["data"]
    assert data["returncode"] == 0, data["stderr"]
    assert sorted(row["text"] for row in data["rows"]) == sorted(word_texts())
    unlike_full = [check_text(tiny_llama_path, r["text"], r["answer"]) for r in data["rows"]]
    assert any(unlike_full)


@pytest.mark.compatibility(
    "Ray executor, its resource key patched in for CPUs", "the tokens of one process"
)
@pytest.mark.parametrize("num_workers", [1, 2], ids=["compiled graph", "message queues"])
def test_executor(report: dict[str, Any], tiny_llama_path: Path, num_workers: int) -> None:
    """Proves that the plan reaches workers that vLLM's Ray executor made, both of its ways: Ray's
    compiled graph hands the scheduler's output to the model runner, past the worker; message
    queues, vLLM's default, hand it to the worker, here to two tensor-parallel ones."""
    part = report["executors"]
    assert part["returncode"] == 0, part["stderr"]
    lines = [line for line in part["stdout"].splitlines() if line.startswith(MARK)]
    found = json.loads(lines[num_workers - 1].removeprefix(MARK))
    assert len(lines) == 2
    assert found["workers"] == ["SepLLMCPUWorker"] * num_workers
    for prompt, tokens in zip(prompts(), found["tokens"], strict=True):
        check(tiny_llama_path, prompt, tokens)
