"""Summaries of long files in one batch, with SepLLM's KV cache.

Run: ``python examples/offline_batch.py MODEL FILE...``
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(model: str, files: list[str]) -> None:
    """Print a summary of every file."""
    llm = LLM(
        model=model,
        attention_backend="sepllm",
        additional_config={"sepllm": {"initial_tokens": 4, "window": 1020}},
    )
    question = "Say in two or three sentences what this text is about."
    conversations = [
        [{"role": "user", "content": f"{Path(file).read_text('utf-8')}\n\n{question}"}]
        for file in files
    ]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=64))
    for file, output in zip(files, outputs, strict=True):
        print(f"{file}: {output.outputs[0].text.strip()}")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
