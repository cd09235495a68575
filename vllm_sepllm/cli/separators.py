"""``vllm-sepllm separators``: the derived set, and what it finds in a text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from vllm_sepllm.cli import options
from vllm_sepllm.cli.console import make_console, print_json, print_table
from vllm_sepllm.cli.tokens import load_tokenizer, tokenise
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.rules import RULES, SeparatorRule, token_separators
from vllm_sepllm.policy.separators.vocabulary import Vocabulary, read_vocabulary
from vllm_sepllm.sample import FOLDER

DEFAULT_FILE = FOLDER / "revere.txt"
# the paper's nine separators
CLOSING = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
RECALL = "recall: of the text's tokens that end in one of . , ? ! ; : blank tab newline"


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What one rule finds.

    Attributes:
        rule: its name.
        ids: token ids that it derives from the vocabulary.
        line_breaks: token ids that it takes only behind the end of a segment or of a line.
        num_found: tokens of the text that are separators by it.
        density: the same as a share of the text's tokens.
        recall: share it holds of the text's tokens that end in one of CLOSING; None without such.
    """

    rule: str
    ids: tuple[int, ...]
    line_breaks: tuple[int, ...]
    num_found: int
    density: float
    recall: float | None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token.

    Attributes:
        surface: its text; None for a part of a character.
        count: in the text.
        rules: rule -> how often it is a separator in the text, for the rules that know it.
    """

    id: int
    surface: str | None
    count: int
    rules: dict[str, int]


def separators(
    model: options.Model,
    file: Annotated[
        Path | None, typer.Argument(help="Text, UTF-8; default: a bundled document.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of each table; 0 is all.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """List which tokens each rule takes for separators, and count them in a text."""
    path = file or DEFAULT_FILE
    text = options.read_text(path)
    tokenizer = load_tokenizer(model)
    ids = tokenise(tokenizer, text).ids
    vocabulary = read_vocabulary(tokenizer)
    with options.refusing():
        sets = {rule: token_separators(rule, tokenizer) for rule in RULES}
    results = [measure(rule, sets[rule], ids, vocabulary) for rule in RULES]
    rows = token_rows(ids, sets, vocabulary)
    closing = [row for row in rows if row.count and _closes(row.surface)]
    missed = [row for row in closing if "extended" not in row.rules]
    kept = [row for row in rows if row.rules]
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
    rule: SeparatorRule, separators: TokenSeparators, ids: Sequence[int], vocabulary: Vocabulary
) -> RuleResult:
    """Density and recall of a rule on a text of at least one token."""
    found = separators.mask(ids)
    closes = np.array([_closes(vocabulary.text.get(token_id)) for token_id in ids])
    num_closing = int(closes.sum())
    return RuleResult(
        rule=rule,
        ids=separators.token_ids,
        line_breaks=separators.line_breaks,
        num_found=int(found.sum()),
        density=float(found.mean()),
        recall=int(found[closes].sum()) / num_closing if num_closing else None,
    )


def token_rows(
    ids: Sequence[int], sets: Mapping[SeparatorRule, TokenSeparators], vocabulary: Vocabulary
) -> list[TokenRow]:
    """All tokens of the text and of the sets, the most frequent first, then by id."""
    counts, text = Counter(ids), np.array(ids)
    found = {rule: Counter(text[own.mask(ids)].tolist()) for rule, own in sets.items()}
    known = {rule: {*own.token_ids, *own.line_breaks} for rule, own in sets.items()}
    surfaces = vocabulary.text | vocabulary.control
    rows = [
        TokenRow(
            id=i,
            surface=surfaces.get(i),
            count=counts[i],
            rules={rule: found[rule][i] for rule in sets if i in known[rule]},
        )
        for i in counts.keys() | set().union(*known.values())
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
        num_ids = len({*result.ids, *result.line_breaks})
        table.add_row(result.rule, f"{num_ids:,}", found, density, recall)
    return table


def _rows_table(rows: list[TokenRow], limit: int) -> Table:
    shown = rows[:limit] if limit else rows
    table = Table()
    table.add_column("id", justify="right")
    table.add_column("token")
    table.add_column("in the text", justify="right")
    for rule in RULES:
        table.add_column(rule, justify="right")
    for row in shown:
        # Text, because rich would read [INST] as its own markup
        surface = Text("part of a character" if row.surface is None else repr(row.surface))
        marks = (f"{row.rules[rule]:,}" if rule in row.rules else "" for rule in RULES)
        table.add_row(str(row.id), surface, f"{row.count:,}", *marks)
    if len(shown) < len(rows):
        table.caption = f"{len(rows) - len(shown):,} more; --limit 0 shows all"
    return table
