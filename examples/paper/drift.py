"""Keys that are turned in bfloat16, epoch after epoch: does the error of the model's output grow?

Run: ``python examples/paper/drift.py MODEL OUTPUT.jsonl FILE [FILE ...] [--epochs 50]``. The text
is scored in bfloat16 and in float32 with the same renumbered positions; what is printed is the mean
absolute difference of log-probabilities in five epochs after the first and in the last five. Once
with the model's own separators, of which each is turned once before newer ones push it out, and
once with a separator an epoch, which stays for 32. Measurements that OUTPUT has are not repeated.
"""

import argparse
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

LENGTH, WINDOW, NUM_SEPARATORS = 400, 60, 32
# tokens of an epoch once all separators are there: beside 4 initial tokens
EPOCH = LENGTH - 4 - WINDOW - NUM_SEPARATORS
POLICIES: dict[str, dict[str, Any]] = {
    "own separators": {"separators": "extended"},
    "one separator an epoch": {"preset": "fixed-interval", "interval": EPOCH},
}
DTYPES = ("bfloat16", "float32")


def measure(model: str, tokens: list[int], dtype: str, policy: dict[str, Any]) -> list[float]:
    """The log-probability of each token after the first."""
    from vllm import LLM, SamplingParams

    kept = {"initial_tokens": 4, "window": WINDOW, "max_separators": NUM_SEPARATORS}
    renumbered = {"positions": "renumbered", "max_position": LENGTH}
    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=len(tokens) + 1,
        max_num_seqs=1,
        max_num_batched_tokens=EPOCH,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        attention_backend="sepllm",
        additional_config={"sepllm": kept | renumbered | policy},
    )
    (output,) = llm.generate(
        [{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    assert output.prompt_logprobs is not None
    return [
        at[token].logprob
        for token, at in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        if at is not None
    ]


def main() -> None:
    """Measure what OUTPUT lacks, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--only", nargs=2, help="dtype and policy to measure in this process")
    given = parser.parse_args()
    if given.only is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given.model)
        read = (tokenizer(file.read_text("utf-8"))["input_ids"] for file in given.files)
        tokens = list(chain.from_iterable(read))[: LENGTH + (given.epochs - 1) * EPOCH]
        dtype, name = given.only
        logprobs = measure(given.model, tokens, dtype, POLICIES[name])
        with given.output.open("a") as file:
            file.write(json.dumps({"of": [dtype, name], "logprobs": logprobs}) + "\n")
        return
    for dtype in DTYPES:
        for name in POLICIES:
            if (dtype, name) not in done_in(given.output):
                subprocess.run([sys.executable, *sys.argv, "--only", dtype, name], check=True)
    done = done_in(given.output)
    for name in POLICIES:
        pairs = zip(*(done[dtype, name] for dtype in DTYPES), strict=True)
        apart = [abs(low - high) for low, high in pairs][LENGTH - 1 :]
        first, last = (mean(part) for part in (apart[: 5 * EPOCH], apart[-5 * EPOCH :]))
        print(f"{name}: {first:.4f}, then {last:.4f}, {last / first:.2f} times")


def mean(values: list[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def done_in(output: Path) -> dict[tuple[str, str], list[float]]:
    """(dtype, policy) -> log-probabilities in a file."""
    if not output.exists():
        return {}
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {tuple(line["of"]): line["logprobs"] for line in lines}


if __name__ == "__main__":
    main()
