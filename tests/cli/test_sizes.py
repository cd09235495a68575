"""Sizes are read strictly: a unit that is missing or misspelt is an error, never a guess."""

import pytest

from vllm_sepllm.cli.sizes import format_bytes, parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 21_474_836_480),
        ("512 MiB", 536_870_912),
        ("1.5GiB", 1_610_612_736),
        ("80GB", 80_000_000_000),
        ("64KiB", 65_536),
        ("7B", 7),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "20",
        "20G",
        "20gib",
        "GiB",
        "-1GiB",
        "0GiB",
        "1.5B",
        "1e3MB",
        "20GiB ",
        "1,5GiB",
        "\u0662GiB",
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size in bytes with a unit such as 20GiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("32k", 32_768), ("128K", 131_072), ("1M", 1_048_576), ("1.5k", 1536)],
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["32kB", "0", "k", "1.3k", "-5", "32 000", "", "32kk"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="a number of tokens such as 4096, 32k"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(7, "7 B"), (1024, "1.0 KiB"), (103_600_000, "98.8 MiB"), (21_474_836_480, "20.0 GiB")],
)
def test_printed_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text
