"""Perplexity by position: what is read from a file of measurements; no engine runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

SCRIPT = Path(__file__).resolve().parents[3] / "examples/paper/streaming.py"
METHODS = (
    "full",
    "streaming-llm, positions of the text",
    "sepllm, positions of the text",
    "streaming-llm, renumbered",
    "sepllm, renumbered",
)


def ask(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    LlamaConfig(max_position_embeddings=2000).save_pretrained(folder / "model")
    command = [sys.executable, str(SCRIPT), str(folder / "model"), "book.txt"]
    return subprocess.run(
        [*command, str(folder / "found.jsonl"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_methods_that_are_measured_are_not_measured_again(tmp_path: Path) -> None:
    """Means on both sides of the trained length, of this text and these options alone."""
    line = {"model": "model", "file": "book.txt", "tokens": 4000, "length": None}
    losses = [math.log(value) for value in (2, 8, 3, 27)]
    lines = [line | {"method": name, "losses": losses} for name in METHODS[1:]]
    lines.append(line | {"method": METHODS[1], "losses": [9.0] * 4, "tokens": 20_000})
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    picture = tmp_path / "picture.png"
    options = ("--tokens", "4000", "--without", "full", "--plot", str(picture))
    done = ask(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    expected = "perplexity 4.0, beyond the trained length 9.0"
    assert done.stdout.splitlines() == [f"{name}: {expected}" for name in METHODS[1:]]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_method_that_does_not_exist_cannot_be_left_out(tmp_path: Path) -> None:
    done = ask(tmp_path, "--without", "ful")
    assert done.returncode == 2
    assert "no methods of this name: ful" in done.stderr
