"""The page of ``show`` in a real browser: what moves the position, and what is on the screen."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.chromium import NAMES, Chromium, find_chromium
from tests.support.rule import read_positions, visible
from vllm_sepllm.cli.page import build_page
from vllm_sepllm.policy.visibility import BoolArray, Policy

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"needs a browser, none of {', '.join(NAMES)}: apt-get install chromium"
)

POLICY = Policy(initial_tokens=40, window=252)
BOOK = 100_000
WORDS = [
    "The",
    " quick",
    " brown",
    " fox",
    " jumps",
    ",",
    " over",
    " the",
    " lazy",
    " dog",
    ".",
    "\n",
]
# text that would leave its place if it were taken for markup, a control character, wide and
# combining ones, a token without text, one over a line break
NASTY = ["</script><script>document.title = 'no'</script>", "<b>&amp;", "\r\n", "\x1b", ""]
NASTY += ["\N{CAT FACE}", "日本語", "e\u0301", "\t", "two\nlines", "\n\n", "x" * 300]

# waits until a move is painted, as far as a page can know
MEASURE = """(async positions => {
  const slider = document.getElementById('position');
  const times = [];
  for (const position of positions) {
    const start = performance.now();
    slider.value = position;
    slider.dispatchEvent(new Event('input'));
    await new Promise(done => requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = done;
      channel.port2.postMessage(0);
    }));
    times.push(performance.now() - start);
  }
  return times;
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PROGRAM is not None
    with Chromium(PROGRAM, tmp_path_factory.mktemp("chromium")) as started:
        yield started


def text_of(num_tokens: int) -> tuple[list[str], BoolArray]:
    """Pieces of a text, of which about a tenth are separators."""
    drawn = np.random.default_rng(3).integers(0, len(WORDS), num_tokens)
    pieces = [WORDS[number] for number in drawn]
    return pieces, np.isin(drawn, [WORDS.index(","), WORDS.index("."), WORDS.index("\n")])


def show(
    browser: Chromium, folder: Path, num_tokens: int, policy: Policy = POLICY, kind: str = "initial"
) -> BoolArray:
    """Open a page of a text of so many tokens; its separators."""
    pieces, flags = text_of(num_tokens)
    (folder / "page.html").write_text(
        build_page("t", "s", pieces, flags, policy, "", kind), "utf-8"
    )
    browser.open(folder / "page.html")
    return flags


def position(browser: Chromium) -> int:
    """Where the page says that the query is; slider, field and mark in the text agree."""
    said = browser.run(
        "[document.getElementById('position').value, document.getElementById('number').value,"
        " document.querySelector('.here').dataset.token].map(Number)"
    )
    assert said == [said[0]] * 3
    return int(said[0])


def shown_counts(browser: Chromium) -> list[int]:
    """Initial, kept separators, window, forgotten, not yet read."""
    texts = browser.run(
        "[0, 1, 2, 3, 4].map(k => document.getElementById('count' + k).textContent)"
    )
    return [int(text.replace(",", "")) for text in texts]


def counts(policy: Policy, flags: BoolArray, query: int) -> list[int]:
    """The same from the rule, key by key."""
    read = visible(policy, flags.tolist(), query)
    initial = sum(key < policy.initial_tokens for key in read)
    window = sum(key >= policy.initial_tokens and query - key < policy.window for key in read)
    forgotten = query + 1 - len(read)
    return [initial, len(read) - initial - window, window, forgotten, len(flags) - query - 1]


def states(browser: Chromium) -> dict[int, int]:
    """Token -> state, of all that are drawn."""
    drawn = browser.run(
        "Array.from(document.querySelectorAll('#rows span'),"
        " span => [Number(span.dataset.token), Number(span.classList[0].slice(1))])"
    )
    return dict(drawn)


def is_in_view(browser: Chromium, token: int) -> bool:
    return bool(
        browser.run(
            f"(([text, token]) => token.top >= text.top && token.bottom <= text.bottom)(["
            f"'main', '[data-token=\"{token}\"]'].map("
            "name => document.querySelector(name).getBoundingClientRect()))"
        )
    )


@pytest.mark.parametrize("policy", [POLICY, Policy(4, 60, 50), Policy(0, 100, 0)], ids=str)
def test_the_slider_moves_the_query(browser: Chromium, tmp_path: Path, policy: Policy) -> None:
    flags = show(browser, tmp_path, 5000, policy)
    assert position(browser) == 4999
    box = browser.run("document.getElementById('position').getBoundingClientRect().toJSON()")
    seen = {4999}
    for share in (0.0, 0.06, 0.3, 0.8):
        browser.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        query = position(browser)
        assert abs(query / 4999 - share) < 0.05
        assert query not in seen
        seen.add(query)
        assert shown_counts(browser) == counts(policy, flags, query)
        assert is_in_view(browser, query)
        drawn = states(browser)
        read = set(visible(policy, flags.tolist(), query))
        assert {j for j, state in drawn.items() if state < 3} == read & drawn.keys()
        assert {j for j, state in drawn.items() if state == 4} == {j for j in drawn if j > query}


@pytest.mark.parametrize("focused", ["body", "text", "position"])
def test_keys_move_the_query(browser: Chromium, tmp_path: Path, focused: str) -> None:
    flags = show(browser, tmp_path, 5000)
    if focused != "body":
        browser.run(f"document.getElementById('{focused}').focus()")
    browser.press("Home")
    assert position(browser) == 0
    browser.press("ArrowRight", 3)
    assert position(browser) == 3
    browser.press("ArrowLeft")
    assert position(browser) == 2
    browser.press("PageDown")
    screen = position(browser)
    assert screen > 60
    browser.press("ArrowDown")
    line = position(browser)
    assert screen < line < screen + 60
    browser.press("ArrowUp")
    browser.press("PageUp")
    assert position(browser) <= 2
    browser.press("End")
    assert position(browser) == 4999
    assert is_in_view(browser, 4999)
    assert shown_counts(browser) == counts(POLICY, flags, 4999)
    browser.press("ArrowRight")
    assert position(browser) == 4999


def test_keys_in_the_field_are_its_own(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 500)
    browser.run("document.getElementById('number').focus()")
    browser.press("Home")
    assert position(browser) == 499


def test_a_click_on_a_token_moves_the_query(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 500)
    token = next(j for j in states(browser) if is_in_view(browser, j))
    box = browser.run(
        f"document.querySelector('[data-token=\"{token}\"]').getBoundingClientRect().toJSON()"
    )
    browser.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert position(browser) == token


def test_a_fragment_of_the_address_is_a_position(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 5000)
    browser.run("location.hash = '#1234'")
    browser.frame()
    assert position(browser) == 1234


def test_the_text_stays_where_it_is_unless_it_follows(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 5000)
    before = browser.run("document.querySelector('main').scrollTop")
    browser.run("document.getElementById('follow').click()")
    browser.press("ArrowLeft", 2)
    browser.run("location.hash = '#10'")
    browser.frame()
    assert browser.run("document.querySelector('main').scrollTop") == before > 0
    assert set(states(browser).values()) == {4}


def test_a_protected_prefix_is_drawn(browser: Chromium, tmp_path: Path) -> None:
    flags = show(browser, tmp_path, 5000, kind="protected")
    assert shown_counts(browser) == counts(POLICY, flags, 4999)
    assert browser.run("document.querySelector('.legend b').textContent") == "protected"
    width = browser.run("Number(document.querySelector('svg .initial').getAttribute('width'))")
    full = browser.run("document.querySelector('svg .full').getBBox().width")
    assert width == pytest.approx(full * 40 / 5000, abs=0.1)
    browser.run("document.querySelector('main').scrollTop = 0")
    browser.frame()
    drawn = states(browser)
    assert {j for j, state in drawn.items() if state == 0} == set(range(40))
    colours = browser.run(
        "['.legend .s0', '[data-token=\"0\"]', '[data-token=\"40\"]'].map("
        "name => getComputedStyle(document.querySelector(name)).backgroundColor)"
    )
    assert colours[0] == colours[1] != colours[2]
    show(browser, tmp_path, 5000)
    other = browser.run("getComputedStyle(document.querySelector('.legend .s0')).backgroundColor")
    assert other != colours[0]


def test_the_page_says_the_position_in_an_epoch(browser: Chromium, tmp_path: Path) -> None:
    policy = Policy(4, 60, 20, 200)
    flags = show(browser, tmp_path, 700, policy)
    positions = [
        read[query] for query, read in enumerate(read_positions(policy, flags.tolist(), 700))
    ]
    starts = [i for i in range(1, 700) if positions[i] <= positions[i - 1]]
    assert len(starts) > 3
    for query in (0, 199, starts[0], starts[1] - 1, starts[1], 699):
        browser.run(f"location.hash = '#{query}'")
        browser.frame()
        assert position(browser) == query
        epoch = 1 + sum(start <= query for start in starts)
        said = browser.run("document.getElementById('summary').textContent")
        assert f"is {positions[query]}, in epoch {epoch} of {len(starts) + 1}." in said
        marked = browser.run(
            "Array.from(document.querySelectorAll('[data-epoch]'), s => Number(s.dataset.token))"
        )
        assert marked == [start for start in starts if start in states(browser)]


def test_dark_mode_changes_the_colours(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 5000)
    colours = (
        "['body', '.legend .s0', '.legend .s1', '.legend .s2', '.legend .s3', 'svg .sepllm'].map("
        "name => getComputedStyle(document.querySelector(name))).map("
        "style => [style.backgroundColor, style.color, style.stroke].join())"
    )
    browser.prefer("light")
    light, image = browser.run(colours), browser.screenshot()
    browser.prefer("dark")
    dark, other = browser.run(colours), browser.screenshot()
    browser.prefer("light")
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert light[0].startswith("rgb(255, 255, 255)")
    assert image != other


def test_every_part_of_a_text_is_drawn_as_it_is(browser: Chromium, tmp_path: Path) -> None:
    pieces = NASTY * 40
    page = build_page("t", "s", pieces, np.zeros(len(pieces), dtype=bool), POLICY)
    (tmp_path / "page.html").write_text(page, "utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.run("document.title") == "t: what SepLLM keeps"
    parts: dict[int, dict[float, str]] = {}
    height = browser.run("document.querySelector('main').scrollHeight")
    for top in range(0, int(height), 100):
        browser.run(f"document.querySelector('main').scrollTop = {top}")
        browser.frame()
        drawn = browser.run(
            "Array.from(document.querySelectorAll('#rows span'), s => [Number(s.dataset.token),"
            " s.parentNode.offsetTop, s.textContent + (s.querySelector('u') ? '\\n' : ''),"
            " s.parentNode.scrollWidth > document.querySelector('main').clientWidth])"
        )
        for token, row, text, is_too_wide in drawn:
            parts.setdefault(token, {})[row] = text
            assert not is_too_wide
    whole = ["".join(text for _, text in sorted(parts[j].items())) for j in range(len(pieces))]
    assert whole == [piece.replace("\x1b", "\u241b") for piece in pieces]


def test_a_narrower_window_breaks_the_rows_anew(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 5000)
    rows = "document.getElementById('rows').clientHeight"
    before = browser.run(rows)
    browser.resize(width=420)
    assert browser.run(rows) > 1.3 * before
    assert is_in_view(browser, 4999)
    browser.resize()
    assert browser.run(rows) == before


def test_what_assistive_programs_are_told(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, 500)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        node["role"]["value"]: node["name"]["value"].strip()
        for node in nodes
        if node.get("name", {}).get("value")
    }
    assert named["slider"] == named["spinbutton"] == "position"
    assert named["checkbox"] == "follow"
    assert named["main"] == "text, coloured by what is kept at the position"
    slider = next(node for node in nodes if node["role"]["value"] == "slider")
    assert slider["description"]["value"].startswith("Keys: ")
    # Chromium 156 no longer has it in the tree
    told = browser.run("document.getElementById('position').getAttribute('aria-valuetext')")
    assert told.startswith("After position 499 the cache holds ")


def test_a_book_is_smooth(browser: Chromium, tmp_path: Path) -> None:
    """Only the screen is drawn, so a move costs what it costs in a short text."""
    show(browser, tmp_path, 2000)
    short = moves(browser, 2000)
    flags = show(browser, tmp_path, BOOK)
    assert (tmp_path / "page.html").stat().st_size < 10 * BOOK
    book = moves(browser, BOOK)
    assert shown_counts(browser) == counts(POLICY, flags, position(browser))
    assert browser.run("document.querySelectorAll('*').length") < 3000
    # on a machine with no core to spare a move takes longer, but no longer than in a short text
    is_smooth = np.percentile(book, 95) < 100 or np.median(book) < 2 * np.median(short)
    assert is_smooth, f"milliseconds of a move: {sorted(book)}, in a short text: {sorted(short)}"


def moves(browser: Chromium, num_tokens: int) -> list[float]:
    """Milliseconds of moves of the slider to anywhere."""
    positions = np.random.default_rng(5).integers(0, num_tokens, 60).tolist()
    return list(browser.run(f"{MEASURE}({positions})"))
