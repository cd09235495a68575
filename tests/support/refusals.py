"""What a user reads when something is refused: one sentence, what and what to do instead."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.compatibility import refused

# engine arguments, what is refused, the remedy
Setting = tuple[dict[str, Any], str, str]


def check_sentence(text: str, what: str, remedy: str) -> None:
    assert what in text
    assert remedy in text
    assert "\n" not in text
    assert not text.endswith(".")


def refusal(model: str, **arguments: Any) -> str:
    """What the user reads when he starts ``model`` with sepllm and ``arguments``."""
    from tests.support.tiny_models import selected

    args = selected(model, **arguments)
    with pytest.raises(
        ValueError, match=r"sepllm|separators|full_|protect|set one|renumbered"
    ) as caught:
        args.create_engine_config()
    return str(caught.value)


def refused_settings(settings: Iterable[Setting]) -> list[Any]:
    """A test's parameters, each with its row of the table."""
    return [
        pytest.param(*row, marks=refused(_options(row[0]), *row[1:]), id=str(row[0]))
        for row in settings
    ]


def _options(arguments: dict[str, Any]) -> str:
    """As on the command line."""
    texts = []
    for name, value in arguments.items():
        text = "" if value is True else value if isinstance(value, str) else json.dumps(value)
        texts.append(f"`--{name.replace('_', '-')} {text}".rstrip() + "`")
    return " ".join(texts)
