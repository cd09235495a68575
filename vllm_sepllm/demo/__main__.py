"""Long documents through stock vLLM and sepllm, then one question to a sepllm server.

Run: ``make demo`` or ``python -m vllm_sepllm.demo [--model FOLDER]``
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console

from vllm_sepllm.demo.corpus import QUESTIONS, chat
from vllm_sepllm.demo.offline import MAX_ANSWER_TOKENS, Result, scale
from vllm_sepllm.demo.report import comparison
from vllm_sepllm.models import QWEN_SMALL, ensure_model
from vllm_sepllm.processes import run_in_process, serving

TITLE = "revere"
SERVE_OPTIONS = ["--attention-backend", "sepllm", "--enforce-eager"]
START_SECONDS = 300.0

console = Console()


def measure(model: Path, backend: str, folder: Path) -> Result:
    """Run one side of the comparison in its own process."""
    out = folder / f"{backend}.json"
    command = ["-m", "vllm_sepllm.demo.offline", "--model", str(model)]
    run_in_process([*command, "--backend", backend, "--out", str(out)], folder / f"{backend}.log")
    return Result(**json.loads(out.read_text()))


def ask(base_url: str, model: Path, document: str) -> None:
    """Stream the answer to one question about a document, through the openai client."""
    from openai import OpenAI

    question = QUESTIONS[TITLE].text
    start = time.perf_counter()
    client = OpenAI(base_url=base_url, api_key="unused")
    stream = client.chat.completions.create(
        model=str(model),
        messages=chat(document, question),
        temperature=0.0,
        max_tokens=MAX_ANSWER_TOKENS,
        stream=True,
    )
    console.print(f"  {TITLE}: [bold]{question}[/]\n  ", end="")
    first = None
    for chunk in stream:
        if text := chunk.choices[0].delta.content:
            first = first or time.perf_counter() - start
            console.out(text, end="", highlight=False)
    console.print(f"\n  first token after {first or 0:.1f} s", highlight=False)


def main() -> None:
    """Run the demonstration; every step says what it does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of the converted model")
    args = parser.parse_args()
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="vllm-sepllm-demo-"))
    console.print(f"Logs of the engines are in {folder}")
    console.rule(f"1/4 model: {QWEN_SMALL.name}, a download of {QWEN_SMALL.num_bytes / 1e6:.0f} MB")
    model = ensure_model(args.model, QWEN_SMALL)
    console.print(f"  {model}")
    size = scale()
    share = "" if size.num_characters is None else "a third of each of "
    console.rule(f"2/4 LLM.generate over {share}{len(size.titles)} documents, stock vLLM")
    stock = measure(model, "stock", folder)
    console.rule("3/4 the same with LLM(attention_backend='sepllm')")
    sepllm = measure(model, "sepllm", folder)
    console.print(comparison(stock, sepllm))
    console.rule("4/4 vllm serve --attention-backend sepllm, one streaming question")
    command = ["vllm", "serve", str(model), *SERVE_OPTIONS]
    for name, value in size.engine.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    # vLLM leaves a core to its scheduler, which is half of a small machine
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    with serving(command, folder / "serve.log", START_SECONDS) as base_url:
        ask(base_url, model, size.texts[TITLE])
        console.print("  stopping the server")
    console.print(f"Done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
