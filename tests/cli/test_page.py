"""The page of ``show``: the whole text, nothing that it could break out of, no network.

The page in a browser is tested in tests/cli/test_show_in_chromium.py.
"""

import json
import re
from html.parser import HTMLParser
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from py_mini_racer import MiniRacer

from tests.support.command_line import SENTENCE, Run
from vllm_sepllm.cli.page import asset, build_page
from vllm_sepllm.policy.kept import kept_lengths, token_states
from vllm_sepllm.policy.visibility import Policy

NASTY = ["</script><script>alert(1)</script>", "<b>&amp;", "\r\n", "{{data}}", '"', "\x00\x1b", ""]


class ElementReader(HTMLParser):
    """Every element's name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script gets."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def pieces_of(page: str) -> list[str]:
    """The text of each token, cut out of the whole text as JavaScript does."""
    data = data_of(page)
    ends = list(accumulate(data["lengths"], initial=0))
    units = data["text"].encode("utf-16-le")
    return [units[2 * a : 2 * b].decode("utf-16-le") for a, b in pairwise(ends)]


def separators_of(page: str) -> list[int]:
    return list(accumulate(data_of(page)["separatorGaps"]))


def test_a_note_stands_below_the_plot_as_text() -> None:
    flags = np.zeros(1, dtype=bool)
    page = build_page("t", "s", ["x"], flags, Policy(1, 3), note="<b>5 %</b>")
    assert '<p class="note">&lt;b&gt;5 %&lt;/b&gt;</p>' in page
    assert "note" not in build_page("t", "s", ["x"], flags, Policy(1, 3))


def test_a_line_marks_where_positions_begin_anew() -> None:
    flags = np.zeros(100, dtype=bool)
    # epochs begin after 40 tokens, and then every 36
    page = build_page("t", "s", ["x"] * 100, flags, Policy(1, 3, 0, 40))
    assert page.count('<path class="epoch"') == 2
    assert 'class="epoch"' not in build_page("t", "s", ["x"] * 100, flags, Policy(1, 3, 0))


def test_text_cannot_leave_its_token() -> None:
    flags = np.zeros(len(NASTY), dtype=bool)
    page = build_page("<t>", "</title>", NASTY, flags, Policy(1, 3))
    assert pieces_of(page) == [*NASTY[:5], "\u2400\u241b", ""]
    elements = ElementReader(page).elements
    assert elements.count("script") == 2
    assert elements.count("b") == 5  # the legend's


def test_page_asks_for_nothing_from_a_network() -> None:
    page = build_page("t", "s", ["a"], np.ones(1, dtype=bool), Policy(4, 16))
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_show_writes_the_whole_text(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    said = run("show", tiny_model, text_file, "-o", page, "--window", 16)
    text = page.read_text("utf-8")
    pieces = pieces_of(text)
    assert pieces[0] == "<s>"
    assert "".join(pieces[1:]) == SENTENCE * 40 + "\N{CAT FACE}\n"
    assert f"{len(pieces):,} tokens of {tiny_model.name}" in said
    # the default rule: ends of sentences alone
    kept = {pieces[j] for j in separators_of(text)}
    assert {".", "?"} <= kept
    assert not {";", "\n"} & kept
    run("show", tiny_model, text_file, "-o", page, "--separators", "extended")
    text = page.read_text("utf-8")
    assert len(separators_of(text)) > 40
    assert {";", ".", "\n"} <= {pieces[j] for j in separators_of(text)}
    # the character of four bytes shows once; its other tokens have no text
    assert pieces[-5:] == ["\N{CAT FACE}", "", "", "", "\n"]


def test_show_writes_a_book(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """No token of a long text is left out, and the page is hardly larger than the text."""
    book, page = tmp_path / "book.txt", tmp_path / "out.html"
    book.write_text(SENTENCE * 5000)
    run("show", tiny_model, book, "-o", page)
    data = data_of(page.read_text("utf-8"))
    assert data["numTokens"] == len(data["lengths"]) > 100_000
    assert data["text"] == "<s>" + SENTENCE * 5000
    assert page.stat().st_size < book.stat().st_size + 4 * data["numTokens"]


def test_show_colours_a_protected_prefix(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Up to the first occurrence of the token, in a colour of its own."""
    page = tmp_path / "out.html"
    options = ("-o", page, "--window", 16, "--protect", ";")
    said = run("show", tiny_model, text_file, *options)
    text = page.read_text("utf-8")
    number = pieces_of(text).index(";") + 1
    assert number > 4
    assert f"{number} protected, window 16" in said
    assert data_of(text)["initialTokens"] == number
    assert '<body class="protected">' in text
    assert '<b class="s0">protected</b>' in text
    # too late in the text
    said = run("show", tiny_model, text_file, *options, "--max-protected", number - 1)
    assert "4 initial, window 16" in said
    assert '<body class="initial">' in page.read_text("utf-8")
    assert "no prefix of this text is protected" in said
    refused = run("show", tiny_model, text_file, "-o", page, "--max-protected", 9, code=2)
    assert "--max-protected bounds the prefix that --protect keeps" in refused
    refused = run("show", tiny_model, text_file, "-o", page, "--protect", "<|end|>", code=2)
    assert "protect must be the text of one token" in refused


def test_show_says_that_it_cannot_write(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    page.symlink_to(tmp_path / "missing" / "out.html")
    assert "cannot write" in run("show", tiny_model, text_file, "-o", page, code=2)


def test_show_stops_at_max_tokens(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    assert "the first of" in run(
        "show", tiny_model, text_file, "-o", page, "--max-tokens", "64", "--max-separators", 2
    )
    data = data_of(page.read_text("utf-8"))
    assert len(data["lengths"]) == data["numTokens"] == 64
    assert data["maxSeparators"] == 2


def test_show_refuses_an_unknown_rule(run: Run, tiny_model: Path, text_file: Path) -> None:
    assert "separators must be one of 'paper', 'extended'" in run(
        "show", tiny_model, text_file, "--separators", "none", code=2
    )


def test_show_refuses_to_overwrite_its_text(run: Run, tiny_model: Path, text_file: Path) -> None:
    assert "is FILE itself" in run("show", tiny_model, text_file, "-o", text_file, code=2)


def test_show_refuses_a_page_in_no_folder(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    for page in (tmp_path / "none" / "page.html", tmp_path):
        refused = run("show", tiny_model, text_file, "-o", page, code=2)
        assert "is no file in a folder that exists" in " ".join(refused.replace("│", " ").split())


def script() -> MiniRacer:
    """The page's script in V8, the JavaScript engine of Chromium."""
    engine = MiniRacer()
    engine.eval("const module = {exports: {}};" + asset("page.js"))
    return engine


@pytest.mark.parametrize("policy", [Policy(3, 5), Policy(0, 1, 0), Policy(2, 6, 3)], ids=str)
def test_the_script_follows_the_rule(policy: Policy) -> None:
    is_separator = np.random.default_rng(5).random(63) < 0.4
    page = build_page("t", "s", ["x"] * 63, is_separator, policy)
    found = json.loads(
        script().eval(
            f"const rule = module.exports.makeRule({json.dumps(data_of(page))});"
            "const all = [...Array(63).keys()];"
            "JSON.stringify({"
            "states: all.map(i => all.map(j => rule.state(i, j))),"
            "counts: all.map(i => rule.counts(i)),"
            "lengths: all.map(i => rule.length(i))})"
        )
    )
    assert found["lengths"] == kept_lengths(policy, is_separator).tolist()
    for query in range(63):
        states = token_states(policy, is_separator, query)
        assert found["states"][query] == states.tolist()
        assert found["counts"][query] == np.bincount(states, minlength=5).tolist()


def rows_of(pieces: list[str], columns: int) -> list[str]:
    """Rows as the page's script breaks a text; digits are wide, a token without text is ``.``."""
    starts = list(accumulate(map(len, pieces), initial=0))
    given = json.dumps(["".join(pieces), starts, columns])
    found = json.loads(
        script().eval(
            f"const rows = module.exports.makeRows(...{given}, c => /[0-9]/.test(c) ? 2 : 1);"
            f"const first = {given}[1].slice(0, -1).map((_, j) =>"
            f" module.exports.rowOf(rows, {given}[1], j));"
            "JSON.stringify([[...rows.tokens], [...rows.offsets], first])"
        )
    )
    tokens, offsets, first = found
    text = "".join(pieces)
    rows = [text[a:b] for a, b in pairwise([*offsets, len(text)])]
    for j, row in enumerate(first):
        begin = (tokens[row], offsets[row])
        after = (tokens[row + 1], offsets[row + 1]) if row + 1 < len(tokens) else (len(pieces), 0)
        assert begin <= (j, starts[j]) < after
    return rows


def test_rows_break_at_line_breaks_and_spaces() -> None:
    pieces = ["The", " quick", " brown", "ish", " fox", ".", "\n\n", "A", " dog", "", "\n"]
    assert rows_of(pieces, 10) == ["The quick ", "brownish ", "fox.\n", "\n", "A dog\n"]


def test_what_has_no_space_breaks_where_the_row_is_full() -> None:
    assert rows_of(["abcdef", "ghijklm"], 5) == ["abcde", "fghij", "klm"]
    assert rows_of(["12345"], 5) == ["12", "34", "5"]
    assert rows_of(["\tx", "\ty"], 9) == ["\tx\ty"]
    assert rows_of(["\tx", "\ty"], 8) == ["\tx\t", "y"]
    assert rows_of([" " * 12], 5) == [" " * 6, " " * 6]


@pytest.mark.parametrize("columns", [8, 21, 80])
def test_rows_hold_the_text_once_and_are_never_too_wide(columns: int) -> None:
    drawn = np.random.default_rng(columns).integers(0, 6, 3000)
    pieces = [["x", " word", ".\n", " ", "12", "unbroken" * 4][number] for number in drawn]
    text, end = "".join(pieces), 0
    for row in rows_of(pieces, columns):
        assert text.startswith(row, end)
        end += len(row)
        body = row.rstrip("\n")
        assert "\n" not in body
        assert width_of(body) - body.endswith(" ") <= columns
        following = text[end : end + 1]
        if row == body and following not in ("", " ", "\n"):  # the next word had no room
            word = text[end:].split(maxsplit=1)[0]
            assert width_of(row) + width_of(word) > columns
    assert end == len(text)


def width_of(text: str) -> int:
    return len(text) + sum(map(str.isdigit, text))


def test_attention_over_too_many_tokens_is_refused(
    run: Run, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_sepllm.cli import show

    monkeypatch.setattr(show, "_MAX_ATTENTION", 100)
    refused = run("show", tiny_model, text_file, "--attention", "-o", "page.html", code=2)
    assert "--max-tokens 100 or less" in " ".join(refused.replace("│", " ").split())
