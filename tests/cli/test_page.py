"""The page of ``show``: every token once, nothing that text could break out of, no network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from py_mini_racer import MiniRacer

from tests.support.command_line import SENTENCE, Run
from vllm_sepllm.cli.page import asset, build_page
from vllm_sepllm.policy.kept import kept_lengths, token_states
from vllm_sepllm.policy.visibility import Policy

NASTY = ["</script><script>alert(1)</script>", "<b>&amp;", "\r\n", "{{data}}", '"', "\x00\x1b", ""]


class TokenReader(HTMLParser):
    """Texts and classes of the spans of ``main``, and every element's name."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.classes: list[str] = []
        self.elements: list[str] = []
        self.is_main = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.is_main = self.is_main or tag == "main"
        if self.is_main and tag == "span":
            self.pieces.append("")
            self.classes.append(dict(attrs)["class"] or "")

    def handle_endtag(self, tag: str) -> None:
        self.is_main = self.is_main and tag != "main"

    def handle_data(self, data: str) -> None:
        if self.is_main:
            self.pieces[-1] += data


def read(page: str) -> TokenReader:
    reader = TokenReader()
    reader.feed(page)
    return reader


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
    reader = read(build_page("<t>", "</title>", NASTY, flags, Policy(1, 3)))
    visible = [*NASTY[:5], "\u2400\u241b", ""]
    assert reader.pieces == visible
    assert reader.elements.count("script") == 2
    assert reader.elements.count("b") == 5  # the legend's


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
    reader = read(page.read_text("utf-8"))
    assert reader.pieces[0] == "<s>"
    assert "".join(reader.pieces[1:]) == SENTENCE * 40 + "\N{CAT FACE}\n"
    assert f"{len(reader.pieces):,} tokens of {tiny_model.name}" in said
    assert reader.classes[:4] == ["s0"] * 4
    assert reader.classes[-16:] == ["s2"] * 16
    assert set(reader.classes[4:-16]) == {"s1", "s3"}
    text = page.read_text("utf-8")
    assert text.count(" data-s>") == len(json.loads(data_of(text))["separators"]) > 40
    # the character of four bytes shows once; its other tokens have no text
    assert reader.pieces[-5:] == ["\N{CAT FACE}", "", "", "", "\n"]


def test_show_colours_a_protected_prefix(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Up to the first occurrence of the token, in a colour of its own."""
    page = tmp_path / "out.html"
    options = ("-o", page, "--window", 16, "--protect", ";")
    said = run("show", tiny_model, text_file, *options)
    text = page.read_text("utf-8")
    reader = read(text)
    number = reader.pieces.index(";") + 1
    assert number > 4
    assert f"{number} protected, window 16" in said
    assert reader.classes[: number + 1].count("s0") == number
    assert json.loads(data_of(text))["initialTokens"] == number
    assert '<body class="protected">' in text
    assert '<b class="s0">protected</b>' in text
    # too late in the text
    said = run("show", tiny_model, text_file, *options, "--max-protected", number - 1)
    assert "4 initial, window 16" in said
    assert '<body class="initial">' in page.read_text("utf-8")
    refused = run("show", tiny_model, text_file, "-o", page, "--protect", "<|end|>", code=2)
    assert "protect must be the text of one token" in refused


def test_show_stops_at_max_tokens(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "out.html"
    assert "the first of" in run(
        "show", tiny_model, text_file, "-o", page, "--max-tokens", "64", "--max-separators", 2
    )
    reader = read(page.read_text("utf-8"))
    assert len(reader.pieces) == 64
    assert json.loads(data_of(page.read_text("utf-8")))["maxSeparators"] == 2


def data_of(page: str) -> str:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return found[1]


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


@pytest.mark.parametrize("policy", [Policy(3, 5), Policy(0, 1, 0), Policy(2, 6, 3)], ids=str)
def test_the_script_follows_the_rule(policy: Policy) -> None:
    """Runs the page's script in V8, the JavaScript engine of Chromium."""
    is_separator = np.random.default_rng(5).random(63) < 0.4
    page = build_page("t", "s", ["x"] * 63, is_separator, policy)
    engine = MiniRacer()
    engine.eval("const module = {exports: {}};" + asset("page.js"))
    found = json.loads(
        engine.eval(
            f"const rule = module.exports.makeRule({data_of(page)});"
            "const all = [...Array(63).keys()];"
            "JSON.stringify({"
            "states: all.map(i => Array.from(rule.fill(i, new Uint8Array(63)))),"
            "lengths: all.map(i => rule.length(i))})"
        )
    )
    assert found["lengths"] == kept_lengths(policy, is_separator).tolist()
    for query in range(63):
        assert found["states"][query] == token_states(policy, is_separator, query).tolist()


def test_attention_over_too_many_tokens_is_refused(
    run: Run, tiny_model: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_sepllm.cli import show

    monkeypatch.setattr(show, "_MAX_ATTENTION", 100)
    refused = run("show", tiny_model, text_file, "--attention", "-o", "page.html", code=2)
    assert "--max-tokens 100 or less" in " ".join(refused.replace("│", " ").split())
