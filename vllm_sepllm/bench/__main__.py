"""Compare sepllm with stock vLLM in one run: ``python -m vllm_sepllm.bench run SUITE``.

All sides have an engine of their own and take turns, sample by sample, on the same machine, with
the same bytes of KV cache. Before anything is timed they must answer short prompts alike.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from vllm_sepllm.bench.disaggregation import pairs, read_and_compute
from vllm_sepllm.bench.outside import bench_serve
from vllm_sepllm.bench.plot import plot
from vllm_sepllm.bench.results import Results, render
from vllm_sepllm.bench.shapes.command import shapes
from vllm_sepllm.bench.sides import SIDES, USUAL_SIDES, running
from vllm_sepllm.bench.suites import GATE_TOKENS, SUITES, Work, gate

KV_TOKENS_MARGIN = 1.1  # a block a request is never full

Sides = Annotated[
    list[str] | None,
    typer.Option(help=f"Of {', '.join(SIDES)}; default: {', '.join(USUAL_SIDES)}."),
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plot")(plot)
app.command("shapes")(shapes)


def text_ids(model: str, text: Path) -> list[int]:
    """The text file, or all text files of a folder, as token ids of the model."""
    from transformers import AutoTokenizer

    files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
    if not files:
        raise typer.BadParameter(f"no .txt file in {text}")
    try:
        whole = "\n\n".join(file.read_text("utf-8") for file in files)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {error.filename}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"--text {text} is not UTF-8 text: {error}") from None
    ids: list[int] = AutoTokenizer.from_pretrained(model)(whole)["input_ids"]
    return ids


def check_text(work: Work, text: Path) -> None:
    """Refuse a text that prompts would repeat."""
    least = max(*work.lengths, GATE_TOKENS)
    if len(work.text) < least:
        raise typer.BadParameter(
            f"--text {text} has {len(work.text):,} tokens, but prompts need {least:,}; give a "
            "longer text or a shorter --length"
        )


def checked_sides(given: list[str] | None) -> list[str]:
    """Names of sides; the usual ones if none is given."""
    unknown = [name for name in given or () if name not in SIDES]
    if unknown:
        raise typer.BadParameter(f"no side {unknown[0]!r}; there are {', '.join(SIDES)}")
    return list(given or USUAL_SIDES)


def kv_bytes(model: str, num_tokens: int, num_layers: int | None, dtype: str) -> int:
    """Bytes of full-attention KV of so many tokens, in the dtype of the model."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = num_layers or config.num_hidden_layers
    elements: int = layers * config.num_key_value_heads * head * 2
    size: int = getattr(torch, dtype).itemsize
    return int(num_tokens * KV_TOKENS_MARGIN) * elements * size


def engine_arguments(
    model: str, dtype: str, longest: int, kv_tokens: int, layers: int | None
) -> dict[str, Any]:
    """Of all engines, for requests of ``longest`` tokens; ``layers`` of random weights, or all."""
    overrides: dict[str, Any] = {"max_position_embeddings": longest}
    given: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": longest,
        "hf_overrides": overrides,
        "kv_cache_memory_bytes": kv_bytes(model, kv_tokens, layers, dtype),
    }
    if layers is not None:  # a checkpoint with more layers than the model does not load
        overrides["num_hidden_layers"] = layers
        given["load_format"] = "dummy"
    return given


@contextmanager
def reported(results: Results, out: Path | None) -> Iterator[None]:
    """Print and write the results on leaving, also of an interrupted run."""
    try:
        yield
    finally:
        Console(width=None if sys.stdout.isatty() else 150).print(render(results.rows()))
        if out is not None:
            with out.open("a") as file:
                results.write(file)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="One of " + ", ".join(SUITES) + ".")],
    model: Annotated[str, typer.Option(help="A local folder, or a name in the cache.")],
    text: Annotated[Path, typer.Option(help="A text file or a folder of them.")],
    out: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Requests at once.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.")] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each case.")] = 5,
    side: Sides = None,
    layers: Annotated[int | None, typer.Option(help="Fewer layers, of random weights.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="KV budget, in full tokens.")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="KV block of all sides; default: each side's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "bfloat16",
) -> None:
    """Run a suite and print medians; see the documentation of each suite in bench/suites.py."""
    if suite not in SUITES:
        raise typer.BadParameter(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    chosen, names = SUITES[suite], checked_sides(side)
    try:
        ids = text_ids(model, text)
        work = chosen.work(ids, length, batch, max_tokens, rounds, kv_tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    check_text(work, text)
    longest = work.longest() + 64
    budget = work.kv_tokens or 2 * longest * max(work.batches)
    common = engine_arguments(model, dtype, max(longest, 2048), max(budget, 2048), layers)
    common["enable_prefix_caching"] = chosen.caching
    if block_size is not None:
        common["block_size"] = block_size
    results = Results(suite, {"model": Path(model).name, "layers": layers, **common})
    with (
        tempfile.TemporaryDirectory() as logs,
        running(names, model, common, Path(logs)) as sides,
    ):
        gate(sides, work)
        with reported(results, out):
            chosen.run(sides, work, results)


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="A local folder, or a name in the cache.")],
    text: Annotated[Path, typer.Option(help="A text file or a folder of them.")],
    out: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    length: Annotated[int, typer.Option(help="Prompt tokens, about.")] = 4096,
    requests: Annotated[int, typer.Option(help="Requests, sent at once.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="Samples of each side.")] = 3,
    side: Sides = None,
    kv_tokens: Annotated[int, typer.Option(help="KV budget, in full tokens.")] = 16384,
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "bfloat16",
) -> None:
    """Measure from outside: ``vllm bench serve`` against a ``vllm serve`` of each side in turn."""
    from transformers import AutoTokenizer

    names = checked_sides(side)
    tokenizer = AutoTokenizer.from_pretrained(model)
    work = Work(text_ids(model, text), [length], [requests], max_tokens, rounds)
    check_text(work, text)
    prompts = [tokenizer.decode(work.prompt(number, length)) for number in range(requests)]
    flags = ["--enforce-eager", "--no-enable-prefix-caching", "--dtype", dtype]
    flags += ["--kv-cache-memory-bytes", str(kv_bytes(model, kv_tokens, None, dtype))]
    results = Results("serve", {"model": Path(model).name, "length": length, "flags": flags})
    with tempfile.TemporaryDirectory() as folder, reported(results, out):
        bench_serve(names, model, prompts, max_tokens, rounds, flags, Path(folder), results)


@app.command()
def disaggregation(
    model: Annotated[str, typer.Option(help="A local folder, or a name in the cache.")],
    text: Annotated[Path, typer.Option(help="A text file or a folder of them.")],
    out: Annotated[Path | None, typer.Option(help="Append JSON lines to this file.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Prompt tokens.")] = None,
    rounds: Annotated[int, typer.Option(help="Samples of each case.")] = 5,
    layers: Annotated[int | None, typer.Option(help="Fewer layers, of random weights.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "bfloat16",
) -> None:
    """First token of a decode instance that reads the prompt's KV by NIXL, or computes it."""
    if find_spec("nixl") is None:
        raise typer.BadParameter("NIXL moves the KV cache, and is not installed: pip install nixl")
    work = Work(text_ids(model, text), length or [2048, 8192], [1], 1, rounds)
    check_text(work, text)
    longest = work.longest() + 64
    # prompts wait on the prefill instance until its next step
    common = engine_arguments(model, dtype, longest, 3 * longest, layers)
    common["enable_prefix_caching"] = False
    results = Results("disaggregation", {"model": Path(model).name, "layers": layers, **common})
    with (
        tempfile.TemporaryDirectory() as logs,
        pairs(["stock", "sepllm"], model, common, Path(logs)) as found,
        reported(results, out),
    ):
        read_and_compute(found, work, results)


if __name__ == "__main__":
    app()
