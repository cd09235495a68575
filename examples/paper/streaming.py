"""Perplexity of a book beyond the trained length, by position, method after method.

Run: ``python examples/paper/streaming.py MODEL FILE OUTPUT.jsonl [--tokens 20000] [--length 800]``.
Methods that OUTPUT has are not measured again, so a stopped run goes on. The paper's sizes are
those of its streaming table: 4 initial tokens, a window of 256, 64 separators, 800 positions; plain
windows have the same mean number of keys. Each method is an engine in a process of its own.
``--without METHOD`` leaves one out: full attention of 100,000 tokens takes hours on a CPU. ``--plot
PICTURE`` draws what was measured with these options (matplotlib).
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
    kept = {"separators": "extended", "window": WINDOW, "max_separators": NUM_SEPARATORS}
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
    parser.add_argument("--without", action="append", default=[], metavar="METHOD")
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
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
    if unknown := set(given.without) - known.keys():
        parser.error(f"no methods of this name: {', '.join(unknown)}; there are {', '.join(known)}")
    asked = [line_of(given, name) for name in known if name not in given.without]
    for line in asked:
        if line not in [done["line"] for done in done_in(given.output)]:
            command = [sys.executable, *sys.argv, "--method", line["method"]]
            subprocess.run(command, check=True)
    found = {d["method"]: d["losses"] for d in done_in(given.output) if d["line"] in asked}
    trained = trained_length(given.model) // PIECE
    for name, losses in found.items():
        parts = (losses[:trained], losses[trained:])
        ends = [f"{math.exp(sum(part) / len(part)):,.1f}" for part in parts if part]
        print(f"{name}: perplexity {', beyond the trained length '.join(ends)}")
    if given.plot is not None:
        draw(found, trained * PIECE, given.plot)


def trained_length(model: str) -> int:
    """Positions that the model was trained on."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).max_position_embeddings)


def draw(found: dict[str, list[float]], trained: int, picture: Path) -> None:
    """Perplexity by position, method by method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in found.items():
        middles = [PIECE * (i + 0.5) for i in range(len(losses))]
        axes.plot(middles, [math.exp(loss) for loss in losses], label=name)
    axes.axvline(trained, color="grey", linestyle=":", label="trained length")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("position")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=120)


def line_of(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """What a measurement is of."""
    return {
        "method": method,
        "model": Path(given.model).name,
        "file": given.file.name,
        "tokens": given.tokens,
        "length": given.length if method.endswith("renumbered") else None,
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
