"""Perplexity of a book beyond the trained length, by position, method after method.

Run: ``python examples/paper/streaming.py MODEL FILE OUTPUT.jsonl [--tokens 20000] [--length 800]``.
Methods that OUTPUT has are not measured again, so a stopped run goes on. The paper's sizes are
those of its streaming table: 4 initial tokens, a window of 256, 64 separators, 800 positions; plain
windows have the same mean number of keys. Each method is an engine in a process of its own.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

PIECE = 1000  # tokens of a number
WINDOW, NUM_SEPARATORS = 256, 64


def methods(length: int | None) -> dict[str, dict[str, Any] | None]:
    """Name -> additional_config["sepllm"]; None: full attention."""
    kept = {"window": WINDOW, "max_separators": NUM_SEPARATORS}
    plain = {"preset": "streaming-llm", "window": WINDOW + NUM_SEPARATORS}
    renumbered: dict[str, Any] = {"positions": "renumbered"}
    if length is not None:
        renumbered["max_position"] = length
    return {
        "full": None,
        "streaming-llm, positions of the text": plain,
        "sepllm, positions of the text": kept,
        "streaming-llm, renumbered": plain | renumbered,
        "sepllm, renumbered": kept | renumbered,
    }


def measure(model: str, tokens: list[int], config: dict[str, Any] | None) -> list[float]:
    """Mean negative log-likelihood of each piece."""
    from vllm import LLM, SamplingParams

    num_tokens = len(tokens) + 1
    selected: dict[str, Any] = {}
    if config is not None:
        selected = {"attention_backend": "sepllm", "additional_config": {"sepllm": config}}
    if config is None or "positions" not in config:
        # rotary tables as long as the text: what a model makes of positions that it never saw
        selected["hf_overrides"] = {"max_position_embeddings": num_tokens}
    llm = LLM(
        model=model,
        max_model_len=num_tokens,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        enforce_eager=True,
        kv_cache_memory_bytes=2 << 30,
        **selected,
    )
    (output,) = llm.generate(
        [{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    assert output.prompt_logprobs is not None
    found = [
        -at[token].logprob
        for token, at in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        if at is not None
    ]
    pieces = [found[first : first + PIECE] for first in range(0, len(found), PIECE)]
    return [sum(piece) / len(piece) for piece in pieces]


def main() -> None:
    """Measure what OUTPUT lacks, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--length", type=int, help="positions; default: the trained length")
    parser.add_argument("--method", help="measure this one here, in this process")
    given = parser.parse_args()
    known = methods(given.length)
    if given.method is not None:
        from transformers import AutoTokenizer

        text = given.file.read_text("utf-8")
        tokens = AutoTokenizer.from_pretrained(given.model)(text)["input_ids"][: given.tokens]
        losses = measure(given.model, tokens, known[given.method])
        with given.output.open("a") as file:
            file.write(json.dumps(line_of(given, given.method) | {"losses": losses}) + "\n")
        return
    for name in known:
        if line_of(given, name) not in [done["line"] for done in done_in(given.output)]:
            subprocess.run([sys.executable, *sys.argv, "--method", name], check=True)
    for done in done_in(given.output):
        losses = done["losses"]
        ends = [math.exp(sum(part) / len(part)) for part in (losses[:8], losses[8:]) if part]
        print(f"{done['method']}: " + ", then ".join(f"{value:,.1f}" for value in ends))


def line_of(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """What a measurement is of."""
    return {
        "method": method,
        "model": Path(given.model).name,
        "file": given.file.name,
        "tokens": given.tokens,
        "length": given.length,
    }


def done_in(output: Path) -> list[dict[str, Any]]:
    """The measurements in a file, each with what it is of."""
    if not output.exists():
        return []
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    keys = ("method", "model", "file", "tokens", "length")
    return [done | {"line": {key: done[key] for key in keys}} for done in lines]


if __name__ == "__main__":
    main()
