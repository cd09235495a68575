"""The report's pictures; needs matplotlib, the extra ``eval``.

Run: ``python -m vllm_sepllm.eval.plots results.json FOLDER`` draws them again, in FOLDER
"""

import sys
from collections.abc import Sequence
from math import nan
from pathlib import Path

from vllm_sepllm.eval.methods import FIXED, SEPLLM, STREAMING
from vllm_sepllm.eval.needle import Needles
from vllm_sepllm.eval.report import Result, by_name, read
from vllm_sepllm.eval.statistics import Estimate
from vllm_sepllm.eval.text import Texts

_PANELS = (("ratio", "perplexity, ratio to full attention"), ("kl", "KL to full attention, nats"))

_KINDS = {SEPLLM: "C1", STREAMING: "C2", FIXED: "C3"}


def draw(folder: Path, found: Sequence[Result]) -> list[Path]:
    """``NAME.png`` of each task; of texts ``kv.png`` as well, ``NAME-kv.png`` if there are several.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    texts = by_name([row for row in found if row.kind == Texts.kind])
    for name, text in texts.items():
        budgets = "kv.png" if len(texts) == 1 else f"{name}-kv.png"
        drawn.append(_draw_lines(folder / f"{name}.png", text, _PANELS))
        drawn.append(_draw_budgets(folder / budgets, text))
    for name, needle in by_name([row for row in found if row.kind == Needles.kind]).items():
        panels = (("found", "needles found"),)
        drawn.append(_draw_lines(folder / f"{name}.png", needle, panels))
    return drawn


def _draw_lines(path: Path, found: Sequence[Result], panels: Sequence[tuple[str, str]]) -> Path:
    """One panel a measure, one line a method, with its intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (measure, name) in zip(axes[0], panels, strict=True):
        for number, method in enumerate(dict.fromkeys(row.method for row in found)):
            own = [row for row in found if row.method == method and measure in row.values]
            values = [row.values[measure] for row in own]
            means = [value.mean for value in values]
            lengths = [row.length for row in own]
            if own:
                axis.errorbar(
                    lengths,
                    means,
                    yerr=_errors(values),
                    marker="o",
                    capsize=3,
                    # the same in every panel, also where a method has no line
                    color=f"C{number}",
                    label=method,
                )
        axis.set(xlabel="context, tokens", ylabel=name, xscale="log")
        ticks = sorted({row.length for row in found})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_budgets(path: Path, found: Sequence[Result]) -> Path:
    """What each method costs for the KV that it keeps: one panel a context, one point a method."""
    from matplotlib import pyplot

    lengths = sorted({row.length for row in found})
    figure, axes = pyplot.subplots(
        1, len(lengths), figsize=(5 * len(lengths), 4.2), squeeze=False, sharey=True
    )
    for axis, length in zip(axes[0], lengths, strict=True):
        own = [row for row in found if row.length == length and "ratio" in row.values]
        for kind, color in _KINDS.items():
            rows = sorted((row for row in own if _kind(row) == kind), key=lambda row: row.kept)
            values = [row.values["ratio"] for row in rows]
            errors = _errors(values)
            kept, means = [row.kept for row in rows], [v.mean for v in values]
            if rows:
                axis.errorbar(kept, means, yerr=errors, fmt="o", capsize=3, color=color, label=kind)
            for row, mean in zip(rows, means, strict=True):
                place = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 7}
                axis.annotate(row.method, (row.kept, mean), **place)
        axis.set(xlabel="mean KV, tokens", title=f"context of {length:,} tokens")
        axis.margins(x=0.2)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(_PANELS[0][1])
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _errors(values: Sequence[Estimate]) -> list[list[float]]:
    """Lengths of the bars below and above the means; matplotlib draws none for NaN."""
    below = [nan if v.low is None else v.mean - v.low for v in values]
    return [below, [nan if v.high is None else v.high - v.mean for v in values]]


def _kind(row: Result) -> str:
    """The method whose rule the settings follow."""
    preset = (row.settings or {}).get("preset")
    return SEPLLM if preset is None else str(preset)


def main() -> None:
    """Draw the pictures of a stored run and print their names."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m vllm_sepllm.eval.plots results.json FOLDER")
    results, folder = map(Path, sys.argv[1:])
    try:
        found = read(results)
    except ValueError as error:
        sys.exit(f"[plots] {error}")
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(folder, found):
        print(path)


if __name__ == "__main__":
    main()
