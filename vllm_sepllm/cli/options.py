"""Options that several subcommands take, and their parsed values."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vllm_sepllm.cli.sizes import parse_bytes, parse_tokens
from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, SepLLMConfig
from vllm_sepllm.policy.separators.rules import RULES

T = TypeVar("T")

DEFAULTS = SepLLMConfig()


@contextmanager
def refusing() -> Iterator[None]:
    """Tell the user what a ValueError says, as of a wrong option.

    Raises:
        typer.BadParameter: with its words.
    """
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _parser(parse: Callable[[str], T]) -> Callable[[str | int], T]:
    """``parse`` for typer, which shows the message of a BadParameter alone."""

    def parser(value: str | int) -> T:
        with refusing():
            return parse(str(value))  # typer passes defaults through here as well

    return parser


def _parse_layers(text: str) -> str:
    """The text itself, once it is known to be a list of integers."""
    for item in text.split(","):
        try:
            int(item)
        except ValueError:
            raise ValueError(f"wanted layer indices such as 0,1,-1, got {text!r}") from None
    return text


as_bytes = _parser(parse_bytes)
as_tokens = _parser(parse_tokens)

Model = Annotated[str, typer.Argument(help="Model folder, or a name in the Hugging Face cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
InitialTokens = Annotated[int, typer.Option(min=0, help="Tokens at the start, always kept.")]
Window = Annotated[int, typer.Option(min=1, help="Last tokens kept, the query included.")]
Separators = Annotated[str, typer.Option(help=f"Rule: {', '.join(RULES)}.")]
MaxSeparators = Annotated[
    int | None,
    typer.Option(min=0, help="Most separators kept beyond the window, the latest."),
]
MaxPosition = Annotated[
    int | None,
    typer.Option(
        parser=as_tokens,
        metavar="TOKENS",
        help="Where positions begin anew; default: never, they are those of the text.",
    ),
]
KvMemory = Annotated[
    int,
    typer.Option(parser=as_bytes, metavar="SIZE", help="For the KV cache on each device: 20GiB."),
]
Context = Annotated[
    int,
    typer.Option(parser=as_tokens, metavar="TOKENS", help="Length of each request: 32k is 32,768."),
]
FullLayers = Annotated[
    str | None,
    typer.Option(
        parser=_parser(_parse_layers),
        metavar="LAYERS",
        help="Layers with full attention, such as 0,-1; write --full-layers=-1 for the last.",
    ),
]


def layer_indices(text: str | None) -> tuple[int, ...]:
    """What ``--full-layers`` says."""
    return tuple(int(item) for item in text.split(",")) if text else ()


def json_object(option: str, text: str) -> dict[str, Any]:
    """The object that an option holds as JSON.

    Raises:
        typer.BadParameter: if it is none.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{option} must be a JSON object, got {text}")
    return value


def make_config(**given: object) -> SepLLMConfig:
    """A validated configuration from options; None means the default.

    Raises:
        typer.BadParameter: with the words that ``--additional-config`` would be refused with.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    with refusing():
        return SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: wanted})


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line breaks as they are.

    Raises:
        typer.BadParameter: if there is no such file, or it is no text, or it is empty.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8 text (byte {error.start})") from None
    if not text:
        raise typer.BadParameter(f"{path} is empty; give a file with text")
    return text
