"""One request of a million tokens: memory and speed while it runs.

Run: ``python examples/paper/million.py MODEL OUTPUT.jsonl [--tokens 1000000] FILE [FILE ...]``.
The request is the files, over and over. Every 10 seconds OUTPUT, written anew, gets a line: tokens
computed, tokens kept, share of the KV blocks in use, resident memory. ``--plot PICTURE`` draws them
(matplotlib).
"""

import argparse
import json
import os
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

SECONDS = 10.0
# 4 initial tokens besides, so 512 keys at most
POLICY = {"positions": "renumbered", "separators": "extended", "window": 252, "max_separators": 256}
METRICS = {
    "vllm:sepllm_logical_tokens": "tokens",
    "vllm:sepllm_kept_tokens": "kept",
    "vllm:kv_cache_usage_perc": "kv_usage",
}


def resident_bytes() -> int:
    """Memory of this process, in which engine and worker run as well."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(llm: Any, output: Path, start: float, ended: threading.Event) -> None:
    """A line every so often, until the request has ended."""
    while not ended.wait(SECONDS):
        found = {m.name: m.value for m in llm.get_metrics() if m.name in METRICS}
        line = {short: found.get(name) for name, short in METRICS.items()}
        line |= {"seconds": round(time.monotonic() - start, 1), "resident": resident_bytes()}
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Speed and memory by tokens computed, both from zero; a speed is that of ten lines."""
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 4), layout="constrained")
    pairs = list(zip(lines, lines[10:], strict=False))
    speeds = [
        (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
        for first, last in pairs
    ]
    above.plot([(first["tokens"] + last["tokens"]) / 2 for first, last in pairs], speeds)
    above.set_ylabel("tokens a second")
    tokens = [line["tokens"] for line in lines]
    below.plot(tokens, [line["resident"] / 2**20 for line in lines], label="resident, MiB")
    below.plot(tokens, [line["kept"] for line in lines], label="kept tokens")
    below.set_xlabel("tokens computed")
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.legend()
    for axes in (above, below):
        axes.set_ylim(bottom=0)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Run the request, and compare its last tenth with its first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = [i for file in given.files for i in tokenizer(file.read_text("utf-8"))["input_ids"]]
    tokens = list(islice(cycle(text), given.tokens))
    llm = LLM(
        model=given.model,
        max_model_len=given.tokens + 1,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        kv_cache_memory_bytes=1 << 28,
        attention_backend="sepllm",
        additional_config={"sepllm": POLICY},
    )
    given.output.write_text("")
    ended = threading.Event()
    start = time.monotonic()
    watcher = threading.Thread(target=watch, args=(llm, given.output, start, ended))
    watcher.start()
    try:
        llm.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1))
    finally:
        ended.set()
        watcher.join()
    lines = [json.loads(line) for line in given.output.read_text().splitlines()]
    lines = [line for line in lines if line["tokens"]]
    if len(lines) < 2:
        raise SystemExit(f"the request ended within {SECONDS:.0f} seconds: give more --tokens")
    for part in (lines[: len(lines) // 10 + 2], lines[-(len(lines) // 10 + 2) :]):
        tokens_done = part[-1]["tokens"] - part[0]["tokens"]
        speed = tokens_done / max(1e-9, part[-1]["seconds"] - part[0]["seconds"])
        print(
            f"{part[0]['tokens']:,.0f} to {part[-1]['tokens']:,.0f} tokens: {speed:,.0f} tokens/s, "
            f"{part[-1]['kept']:,.0f} kept, {part[-1]['resident'] / 2**20:,.0f} MiB"
        )
    if given.plot is not None:
        draw(lines, given.plot)


if __name__ == "__main__":
    main()
