"""Output that all subcommands share."""

import json
import os
import sys

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

# columns of a file or pipe, which have no width of their own; rich would take 80 and cut tables
_PLAIN_WIDTH = 120


def make_console() -> Console:
    """A console on the current stdout."""
    return Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def print_table(console: Console, title: str, table: Table) -> None:
    """A table under a title of its own, which rich would break at the table's width."""
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)


def print_json(value: object) -> None:
    """One JSON document, not wrapped."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def quiet_vllm() -> None:
    """Keep vLLM's log off what a command prints; a user who set these wants to read it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
