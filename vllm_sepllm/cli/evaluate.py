"""``vllm-sepllm eval``: a quality suite in real vLLM, every method on the same questions."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_sepllm import __version__
from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console
from vllm_sepllm.cli.doctor import installed_version
from vllm_sepllm.cli.eval_progress import Progress
from vllm_sepllm.cli.kv_sizes import load_shape
from vllm_sepllm.cli.tokens import load_tokenizer
from vllm_sepllm.policy.initial import protected_end
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.sample import FOLDER

if TYPE_CHECKING:  # they import torch
    from vllm_sepllm.eval.run import Row
    from vllm_sepllm.eval.store import Store
    from vllm_sepllm.eval.suite_file import Suite
    from vllm_sepllm.eval.task import Task


def evaluate(
    model: options.Model,
    suite: Annotated[
        Path,
        typer.Argument(help="Tasks and methods, YAML: see examples/eval/, docs/quality.md."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of answers and report.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the files that the suite names; default: vllm_sepllm's own documents."
        ),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Ask this many of each task, from the first.")
    ] = None,
) -> None:
    """Measure quality: put the same questions to every method, in real vLLM, and compare.

    Every answer is stored at once. A run that was stopped goes on from there with the same command.
    """
    from vllm_sepllm.eval.build import build
    from vllm_sepllm.eval.methods import ModelFacts
    from vllm_sepllm.eval.suite_file import read_suite

    with options.refusing():
        wanted = read_suite(suite)
        num_layers, tokenizer = _num_layers(model), load_tokenizer(model)
        built = build(wanted, data or FOLDER, tokenizer, questions)
    longest = max(task.length for task, _ in built)
    facts = ModelFacts(
        lambda spec: token_separators(spec, tokenizer),
        lambda protect: protected_end(protect, tokenizer, len(tokenizer)),
        num_layers,
        longest,
    )
    described = {
        "model": model,
        "engine": wanted.engine,
        "versions": {"vllm": installed_version("vllm"), "vllm_sepllm": __version__},
        "max_model_len": longest,
        "tasks": {task.name: described for task, described in built},
    }
    _measure(output, [task for task, _ in built], wanted, facts, described)


def _measure(
    output: Path,
    tasks: Sequence["Task"],
    suite: "Suite",
    facts: Any,
    described: dict[str, Any],
) -> None:
    """Ask what ``output`` lacks and write the report, after every round."""
    from vllm_sepllm.eval import methods, report
    from vllm_sepllm.eval.run import missing, plan, run
    from vllm_sepllm.eval.store import Store

    model = described["model"]
    arguments = {**suite.engine, "max_model_len": facts.max_model_len}
    with ExitStack() as until_end:
        try:
            rows = plan(tasks, suite.compared, facts)
            settings = {row.key: methods.described(row.method.settings, facts) for row in rows}
            described["settings"] = settings
            store = until_end.enter_context(closing(Store(output, described)))
            num_missing = missing(rows, store)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        except OSError as error:
            raise typer.BadParameter(f"cannot use --output {output}: {error.strerror}") from None
        _check_engines(rows, store, model, arguments)

        def write() -> Sequence[Any]:
            found = report.results(rows, store, facts)
            report.write(output, found, described)
            return found

        total = sum(len(row.task.asked) for row in rows)
        with Progress(total, total - num_missing, write) as progress:
            run(rows, store, model, arguments, progress)
        found = write()
    console = make_console()
    console.print(report.markdown(found), markup=False, soft_wrap=True)
    _draw(output, found)


def _check_engines(
    rows: Sequence["Row"], store: "Store", model: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse a method whose engine would not start, before those of the others have worked."""
    from vllm_sepllm.eval.engine import llm_arguments
    from vllm_sepllm.eval.run import engines, missing

    for group in engines(rows):
        if not missing(group, store):
            continue
        method = group[0].method
        given = llm_arguments(method.settings, arguments)
        # imports vLLM: not without an answer to get, and not before llm_arguments
        from vllm_sepllm.integration.startup.diagnosis import refusal

        reason = refusal({"model": model, **given})
        if reason is not None:
            raise typer.BadParameter(f"no engine for {method.name}: {reason}")


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
