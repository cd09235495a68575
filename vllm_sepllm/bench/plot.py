"""Pictures of what a benchmark wrote."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def plot(
    results: Annotated[Path, typer.Argument(help="JSON lines of --out.")],
    out: Annotated[Path, typer.Argument(help="A .png or .svg file.")],
    suite: Annotated[str, typer.Option(help="Which suite's lines.")],
    measure: Annotated[str, typer.Option(help="Which measure of it.")],
) -> None:
    """Draw bars of one measure by case and side; their whiskers reach from p20 to p80.

    Needs the extra ``bench`` (matplotlib).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows = [r for r in rows if (r["suite"], r["measure"]) == (suite, measure)]
    if not rows:
        raise typer.BadParameter(f"{results} has no {measure} of {suite}")
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    cases, sides = _unique(rows, "case"), _unique(rows, "side")
    width = 0.8 / len(sides)
    for number, side in enumerate(sides):
        own = {r["case"]: r for r in rows if r["side"] == side}
        at = [i + number * width for i, case in enumerate(cases) if case in own]
        shown = [own[case] for case in cases if case in own]
        whiskers = [[r["p50"] - r["p20"] for r in shown], [r["p80"] - r["p50"] for r in shown]]
        axes.bar(at, [r["p50"] for r in shown], width, yerr=whiskers, capsize=2, label=side)
    axes.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(cases))],
        [case.replace(", ", "\n") for case in cases],
        fontsize="small",
    )
    axes.set_ylabel(measure)
    axes.set_title(f"{suite}: {rows[0]['device']}, {rows[0]['threads']} threads")
    axes.legend()
    figure.savefig(out, dpi=120)


def _unique(rows: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
