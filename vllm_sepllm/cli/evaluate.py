"""``vllm-sepllm eval``: the quality suite in real vLLM, against other methods at equal mean KV."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_sepllm import __version__
from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console
from vllm_sepllm.cli.doctor import installed_version
from vllm_sepllm.cli.eval_inputs import identity, read_texts, task_items, text_items
from vllm_sepllm.cli.kv_sizes import load_shape
from vllm_sepllm.cli.tokens import load_tokenizer
from vllm_sepllm.eval.methods import (
    FIXED,
    FULL,
    SEPLLM,
    STREAMING,
    Method,
    ModelFacts,
    Wanted,
)
from vllm_sepllm.policy.separators.rules import separator_ids

if TYPE_CHECKING:  # they import torch
    from vllm_sepllm.eval.store import Store
    from vllm_sepllm.eval.suite import Group

# fields of EngineArgs that would change what is measured without a word
_CHOSEN = {
    "model": "name it as MODEL",
    "attention_backend": "each method has its own",
    "attention_config": "each method has its own",
    "additional_config": "settings go into --config, --also, --budget and --equal",
    "max_model_len": "it is the longest context of the run",
}
_MIN_CONTEXT = 16

Lengths = Annotated[
    list[int],
    typer.Option(parser=options.as_tokens, metavar="TOKENS", help="Repeat for several: 1k."),
]


def evaluate(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of cells and report.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Long text, UTF-8; repeat for several.")
    ] = None,
    context: Lengths = [1024, 2048, 4096],  # noqa: B006  # typer copies it
    needle_context: Lengths = [1024, 2048],  # noqa: B006
    excerpts: Annotated[int, typer.Option(min=0, help="Of each text and context; 0: none.")] = 1,
    positions: Annotated[int, typer.Option(min=2, help="Compared by KL in each excerpt.")] = 128,
    depth: Annotated[
        list[float], typer.Option(min=0, max=1, help="Of needles; repeat for several.")
    ] = [0.0, 0.25, 0.5, 0.75, 1.0],  # noqa: B006
    needles: Annotated[int, typer.Option(min=0, help="Of each depth and context; 0: none.")] = 2,
    gsm8k: Annotated[
        Path | None, typer.Option(help="GSM8K's test.jsonl; needs lm_eval, the extra eval.")
    ] = None,
    qa: Annotated[
        Path | None, typer.Option(help="Lines of {context, question, answer}, JSON; as --gsm8k.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Of --gsm8k and of --qa.")] = 200,
    config: Annotated[str, typer.Option(help="sepllm's settings, JSON.")] = "{}",
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="Also these, and StreamingLLM at their mean KV."),
    ] = None,
    equal: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=JSON", help="Also these, at the mean KV of --config."),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="Also these, as they are.")
    ] = None,
    engine_args: Annotated[
        str, typer.Option(help='vLLM\'s EngineArgs, JSON: \'{"dtype": "float32"}\'.')
    ] = "{}",
) -> None:
    """Text, needles and tasks: sepllm, full attention, StreamingLLM and FixLLM at equal mean KV.

    Run again with the same options it goes on where it was stopped. --text is read as continuous
    text and hides the needles; books serve well. --budget, --equal and --also can be repeated; the
    window of --equal is chosen. Nothing is downloaded.
    """
    extras = {"budgets": budget, "equal": equal, "also": also}
    methods = {kind: [_method(item) for item in given or ()] for kind, given in extras.items()}
    _check_methods(**methods)
    wanted = Wanted(_settings("--config", config), **methods)
    lists: dict[str, list[Any]] = {
        "context": context,
        "needle_context": needle_context,
        "depth": depth,
    }
    sizes: dict[str, Any] = {"excerpts": excerpts, "positions": positions, "needles": needles}
    # what is named twice is no second measurement
    sizes |= {name: list(dict.fromkeys(values)) for name, values in lists.items()}
    run: dict[str, Any] = {"model": model, "sizes": sizes}
    run["engine_args"] = _engine_args(engine_args)
    _check_lengths(context)
    num_layers, tokenizer = _num_layers(model), load_tokenizer(model)
    items = text_items(tokenizer, read_texts(text or ()), sizes)
    items += task_items(tokenizer, gsm8k, qa, questions)
    if not items:
        raise typer.BadParameter(
            "nothing to evaluate; give --text, --gsm8k or --qa, and not 0 for both --excerpts and "
            "--needles"
        )
    run["texts"] = [identity(path) for path in text or ()]
    run["tasks"] = {"gsm8k": identity(gsm8k), "qa": identity(qa), "questions": questions}
    run["versions"] = {"vllm": installed_version("vllm"), "vllm_sepllm": __version__}
    longest = max(item.length for item in items)
    facts = ModelFacts(lambda spec: separator_ids(spec, tokenizer), num_layers, longest)
    _measure(output, items, wanted, facts, run)


def _measure(
    output: Path,
    items: Sequence[Any],
    wanted: Wanted,
    facts: ModelFacts,
    described: dict[str, Any],
) -> None:
    """Compute what ``output`` lacks and write the report."""
    from vllm_sepllm.eval import report
    from vllm_sepllm.eval.store import Store
    from vllm_sepllm.eval.suite import plan, run

    try:
        groups = plan(items, wanted, facts)
        described["settings"] = {group.row: group.method.settings for group in groups}
        store = Store(output, described)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise typer.BadParameter(f"cannot use --output {output}: {error.strerror}") from None
    model = described["model"]
    arguments = {**described["engine_args"], "max_model_len": facts.max_model_len}
    _check_engines(groups, store, model, arguments)
    with _progress() as progress:
        task = progress.add_task("", total=sum(len(group.cells) for group in groups))

        def advance(key: str) -> None:
            progress.update(task, advance=1, description=key)

        run(groups, store, model, arguments, advance)
    found = report.rows(groups, store)
    report.write(output, found, described)
    console = make_console()
    console.print(report.markdown(found), markup=False, soft_wrap=True)
    _draw(output, found)


def _check_engines(
    groups: Sequence["Group"], store: "Store", model: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse a method whose engine would not start, before those of the others have worked."""
    from vllm_sepllm.eval.engine import llm_arguments

    wanted: dict[str, Method] = {}
    for group in groups:
        if not all(store.has(cell.key) for cell in group.cells):
            wanted.setdefault(json.dumps(group.method.settings, sort_keys=True), group.method)
    for method in wanted.values():
        given = llm_arguments(method.settings, arguments)
        # imports vLLM: not without a cell to compute, and not before llm_arguments
        from vllm_sepllm.integration.startup.diagnosis import refusal

        reason = refusal({"model": model, **given})
        if reason is not None:
            raise typer.BadParameter(f"no engine for {method.name}: {reason}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=make_console())


def _settings(option: str, text: str) -> dict[str, Any]:
    """sepllm's settings as JSON, validated and otherwise as given."""
    given = options.json_object(option, text)
    options.make_config(**given)
    return given


def _engine_args(text: str) -> dict[str, Any]:
    """vLLM's arguments, without those that a run chooses itself."""
    given = options.json_object("--engine-args", text)
    taken = sorted(_CHOSEN.keys() & given.keys())
    if taken:
        raise typer.BadParameter(
            "; ".join(f"--engine-args must not hold {name}: {_CHOSEN[name]}" for name in taken)
        )
    return given


def _check_lengths(context: Sequence[int]) -> None:
    short = [length for length in context if length < _MIN_CONTEXT]
    if short:
        raise typer.BadParameter(f"--context must be {_MIN_CONTEXT} or more, got {short[0]}")


def _method(text: str) -> Method:
    name, _, settings = text.partition("=")
    if not settings or not name.replace("-", "").replace(".", "").isalnum():
        raise typer.BadParameter(
            f"settings to add must be NAME=JSON, such as w508={{...}}, got {text!r}"
        )
    return Method(name, _settings(name, settings))


def _check_methods(
    budgets: Sequence[Method], equal: Sequence[Method], also: Sequence[Method]
) -> None:
    names = [FULL, SEPLLM, STREAMING, FIXED]
    names += [f"{method.name}-streaming" for method in budgets]
    for method in (*budgets, *equal, *also):
        if method.name in names:
            raise typer.BadParameter(f"the name {method.name} is taken; choose another")
        names.append(method.name)
    for method in equal:
        if method.settings and "window" in method.settings:
            raise typer.BadParameter(
                f"--equal chooses the window of {method.name}: leave it out, or take --also"
            )


def _num_layers(model: str) -> int:
    """Layers of a model with ordinary attention in each."""
    try:
        shape = load_shape(model)
    except ValueError as error:
        raise typer.BadParameter(f"no evaluation of {model!r}: {error}") from None
    if len(shape.full) != shape.num_layers:
        raise typer.BadParameter(
            f"{model} has layers of several kinds, whose mean KV cannot be made equal; "
            "evaluate a model with full attention in every layer"
        )
    return shape.num_layers


def _draw(output: Path, found: Sequence[Any]) -> None:
    from vllm_sepllm.eval.plots import draw

    console = make_console()
    try:
        drawn = draw(output, found)
    except ImportError:
        console.print("No plots: matplotlib is missing; pip install 'vllm-sepllm\\[eval]'")
        return
    for path in (output / "report.md", output / "results.json", *drawn):
        console.print(str(path), markup=False, soft_wrap=True)
