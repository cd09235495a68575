"""``vllm-sepllm eval``: the quality suite in real vLLM, against other methods at equal mean KV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console
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
from vllm_sepllm.policy.separators import separator_ids

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
    texts = {path.stem: options.read_text(path) for path in text or ()}
    if not texts and gsm8k is None and qa is None:
        raise typer.BadParameter("nothing to evaluate; give --text, --gsm8k or --qa")
    tokenizer = load_tokenizer(model)
    sizes = {"context": context, "needle_context": needle_context, "excerpts": excerpts}
    sizes |= {"positions": positions, "depth": depth, "needles": needles}
    items = _items(tokenizer, texts, sizes)
    items += _tasks(tokenizer, gsm8k, qa, questions)
    run: dict[str, Any] = {
        "model": model,
        "texts": [path.name for path in text or ()],
        "sizes": sizes,
    }
    run["tasks"] = [str(gsm8k), str(qa), questions]
    run["engine_args"] = options.json_object("--engine-args", engine_args)
    extras = {"budgets": budget, "equal": equal, "also": also}
    methods = {kind: [_method(item) for item in given or ()] for kind, given in extras.items()}
    _check_methods(**methods)
    wanted = Wanted(_settings("--config", config), **methods)
    _measure(output, items, wanted, _facts(model, tokenizer), run)


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

    groups = plan(items, wanted, facts)
    described["settings"] = {
        f"{g.suite} {g.length} {g.method.name}": g.method.settings for g in groups
    }
    try:
        store = Store(output, described)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with _progress() as progress:
        task = progress.add_task("", total=sum(len(group.cells) for group in groups))

        def advance(key: str) -> None:
            progress.update(task, advance=1, description=key)

        run(groups, store, described["model"], described["engine_args"], advance)
    found = report.rows(groups, store)
    report.write(output, found, described)
    console = make_console()
    console.print(report.markdown(found), markup=False, soft_wrap=True)
    _draw(output, found)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=make_console())


def _settings(option: str, text: str) -> dict[str, Any]:
    """sepllm's settings as JSON, validated and otherwise as given."""
    given = options.json_object(option, text)
    options.make_config(**given)
    return given


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


def _items(tokenizer: Any, texts: dict[str, str], sizes: dict[str, Any]) -> list[Any]:
    from vllm_sepllm.eval.needle import needles
    from vllm_sepllm.eval.text import excerpts

    prefix = list(tokenizer("")["input_ids"])
    items: list[Any] = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for length in sizes["context"]:
            try:
                items += excerpts(
                    name,
                    ids,
                    prefix,
                    length=length,
                    num_excerpts=sizes["excerpts"],
                    num_positions=sizes["positions"],
                )
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
    for length in sizes["needle_context"] if texts and sizes["needles"] else ():
        items += needles(
            tokenizer,
            list(texts.values()),
            length=length,
            depths=sizes["depth"],
            num_repeats=sizes["needles"],
        )
    return items


def _tasks(tokenizer: Any, gsm8k: Path | None, qa: Path | None, limit: int) -> list[Any]:
    if gsm8k is None and qa is None:
        return []
    try:
        from vllm_sepllm.eval import tasks
    except ImportError as error:
        raise typer.BadParameter(
            f"--gsm8k and --qa need lm_eval ({error}); pip install 'vllm-sepllm[eval]'"
        ) from None
    configs = [] if gsm8k is None else [tasks.gsm8k(gsm8k), tasks.gsm8k_answers(gsm8k)]
    configs += [] if qa is None else [tasks.passages(qa)]
    return [tasks.make_task(config, limit, tokenizer) for config in configs]


def _facts(model: str, tokenizer: Any) -> ModelFacts:
    from transformers import AutoConfig

    from vllm_sepllm.cli.kv_sizes import read_shape

    shape = read_shape(AutoConfig.from_pretrained(model))
    if len(shape.full) != shape.num_layers:
        raise typer.BadParameter(
            f"{model} has layers of several kinds, whose mean KV cannot be made equal; "
            "evaluate a model with full attention in every layer"
        )
    return ModelFacts(lambda spec: separator_ids(spec, tokenizer), shape.num_layers)


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
