"""The command line as a whole: subcommands, the version, and no network."""

import os
from typing import Annotated

import typer

from vllm_sepllm import __version__
from vllm_sepllm.cli.doctor import doctor
from vllm_sepllm.cli.evaluate import evaluate
from vllm_sepllm.cli.plan import plan
from vllm_sepllm.cli.separators import separators
from vllm_sepllm.cli.show import show

app = typer.Typer(
    name="vllm-sepllm",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (doctor, separators, plan, show):
    app.command()(command)
app.command("eval")(evaluate)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"vllm-sepllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Look at SepLLM's KV cache before you serve with it.

    MODEL is a local folder, or a name in the Hugging Face cache.
    Set the environment variable HF_HUB_OFFLINE=0 to download it.
    """
    # read by huggingface_hub when it is first imported, which no command has done yet
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Entry point of the console script."""
    app()
