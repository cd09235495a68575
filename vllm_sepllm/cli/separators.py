"""``vllm-sepllm separators``: the derived set, and what it finds in a text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console, print_json, print_table
from vllm_sepllm.cli.tokens import load_tokenizer, tokenise
from vllm_sepllm.policy.separators.rules import SeparatorRule, separator_ids
from vllm_sepllm.policy.separators.vocabulary import Vocabulary, read_vocabulary
from vllm_sepllm.sample import FOLDER

DEFAULT_FILE = FOLDER / "revere.txt"
RULES: tuple[SeparatorRule, ...] = ("paper", "extended")
# the paper's nine separators
CLOSING = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
RECALL = "recall: of the text's tokens that end in one of . , ? ! ; : blank tab newline"


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What one rule finds.

    Attributes:
        rule: its name.
        ids: token ids that it derives from the vocabulary.
        num_found: tokens of the text that are separators by it.
        density: the same as a share of the text's tokens.
        recall: share it holds of the text's tokens that end in one of CLOSING; None without such.
    """

    rule: str
    ids: tuple[int, ...]
    num_found: int
    density: float
    recall: float | None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token: its surface (None for a part of a character), its count in the text, its rules."""

    id: int
    surface: str | None
    count: int
    is_paper: bool
    is_extended: bool


def separators(
    model: options.Model,
    file: Annotated[
        Path | None, typer.Argument(help="Text, UTF-8 [default: a bundled document]")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of each table; 0 is all.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """The separators of a model's tokenizer, by the paper's rule and by the extended one."""
    path = file or DEFAULT_FILE
    text = options.read_text(path)
    tokenizer = load_tokenizer(model)
    ids = tokenise(tokenizer, text).ids
    vocabulary = read_vocabulary(tokenizer)
    try:
        sets = {rule: separator_ids(rule, tokenizer) for rule in RULES}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    results = [measure(rule, sets[rule], ids, vocabulary) for rule in RULES]
    rows = token_rows(ids, sets["paper"], sets["extended"], vocabulary)
    missed = [row for row in rows if row.count and not row.is_extended and _closes(row.surface)]
    kept = [row for row in rows if row.is_paper or row.is_extended]
    if as_json:
        names = {"model": model, "text": path.name, "num_tokens": len(ids), "recall_of": RECALL}
        found = {"rules": list(map(asdict, results)), "separators": list(map(asdict, kept))}
        print_json({**names, **found, "missed_by_extended": list(map(asdict, missed))})
        return
    console = make_console()
    print_table(console, f"{model} on {path.name}, {len(ids):,} tokens", _summary(results))
    console.print(RECALL, style="dim")
    title = "Separators, the most frequent in the text first"
    print_table(console, title, _rows_table(kept, limit))
    if missed:
        title = "Tokens with such an end that the extended rule leaves out"
        print_table(console, title, _rows_table(missed, limit))


def measure(
    rule: str, separator_set: Sequence[int], ids: Sequence[int], vocabulary: Vocabulary
) -> RuleResult:
    """Density and recall of a set of separators on a text of at least one token."""
    chosen = set(separator_set)
    closing = [token_id for token_id in ids if _closes(vocabulary.text.get(token_id))]
    num_found = sum(token_id in chosen for token_id in ids)
    num_recalled = sum(token_id in chosen for token_id in closing)
    recall = num_recalled / len(closing) if closing else None
    return RuleResult(rule, tuple(separator_set), num_found, num_found / len(ids), recall)


def token_rows(
    ids: Sequence[int], paper: Sequence[int], extended: Sequence[int], vocabulary: Vocabulary
) -> list[TokenRow]:
    """All tokens of the text and of the sets, the most frequent first, then by id."""
    counts = Counter(ids)
    is_paper, is_extended = set(paper), set(extended)
    surfaces = vocabulary.text | vocabulary.control
    rows = [
        TokenRow(i, surfaces.get(i), counts[i], i in is_paper, i in is_extended)
        for i in counts.keys() | is_paper | is_extended
    ]
    return sorted(rows, key=lambda row: (-row.count, row.id))


def _closes(surface: str | None) -> bool:
    return bool(surface) and str(surface).endswith(CLOSING)


def _summary(results: list[RuleResult]) -> Table:
    table = Table()
    table.add_column("rule")
    for name in ("token ids", "separators in the text", "density", "recall"):
        table.add_column(name, justify="right")
    for result in results:
        recall = "-" if result.recall is None else f"{result.recall:.1%}"
        found, density = f"{result.num_found:,}", f"{result.density:.1%}"
        table.add_row(result.rule, f"{len(result.ids):,}", found, density, recall)
    return table


def _rows_table(rows: list[TokenRow], limit: int) -> Table:
    shown = rows[:limit] if limit else rows
    table = Table()
    table.add_column("id", justify="right")
    table.add_column("token")
    table.add_column("in the text", justify="right")
    for rule in RULES:
        table.add_column(rule, justify="center")
    for row in shown:
        # Text, because rich would read [INST] as its own markup
        surface = Text("part of a character" if row.surface is None else repr(row.surface))
        marks = ("yes" if held else "" for held in (row.is_paper, row.is_extended))
        table.add_row(str(row.id), surface, f"{row.count:,}", *marks)
    if len(shown) < len(rows):
        table.caption = f"{len(rows) - len(shown):,} more; --limit 0 shows all"
    return table
