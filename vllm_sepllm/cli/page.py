"""One HTML page of a text and what the cache keeps of it: no network, light and dark."""

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from vllm_sepllm.policy.epochs import Epoch, epochs_of
from vllm_sepllm.policy.kept import kept_lengths
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy

# sizes of the plot, in the units of its viewBox
VIEW_WIDTH, VIEW_HEIGHT = 1000, 190
LEFT, TOP, WIDTH, HEIGHT = 62, 12, 828, 148
_MAX_POINTS = 800
# C0 controls but tab, line feed and carriage return are not allowed in HTML
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)}


def asset(name: str) -> str:
    """Text of a file in ``assets/``."""
    return files("vllm_sepllm.cli").joinpath("assets", name).read_text("utf-8")


def build_page(
    title: str,
    subtitle: str,
    pieces: Sequence[str],
    is_separator: BoolArray,
    policy: Policy,
    note: str = "",
    initial: str = "initial",
) -> str:
    """The whole page; its script draws what is on the screen, and shows the last position first.

    Args:
        title: of the text; escaped here, as everything else is.
        subtitle: what the tokens and the policy are.
        pieces: [num_tokens], the text of each token.
        is_separator: [num_tokens], whether each is a separator.
        policy: a, n and s.
        note: a sentence below the plot.
        initial: what the initial tokens are, "initial" or "protected", each in its colour.
    """
    last = len(pieces) - 1
    lengths = kept_lengths(policy, is_separator)
    epochs = [] if policy.max_position is None else epochs_of(policy, is_separator)
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "initial": html.escape(initial),
        "style": asset("page.css"),
        "script": asset("page.js"),
        "last": str(last),
        "plot": _plot(lengths, policy, epochs),
        "note": f'<p class="note">{html.escape(note)}</p>' if note else "",
        "summary": f"The cache ends with {lengths[-1]:,} entries, full attention {last + 1:,}.",
        "data": _data(pieces, is_separator, policy, epochs),
    }
    # one pass, so that text that looks like a placeholder stays text
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def _data(
    pieces: Sequence[str], is_separator: BoolArray, policy: Policy, epochs: Sequence[Epoch]
) -> str:
    """What the script needs, as JSON that cannot close its element."""
    # lone surrogates cannot be written as UTF-8
    shown = [p.translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8") for p in pieces]
    data = {
        "numTokens": len(is_separator),
        "initialTokens": policy.initial_tokens,
        "window": policy.window,
        "maxSeparators": policy.max_separators,
        "text": "".join(shown),
        # as JavaScript counts them, in units of UTF-16
        "lengths": [len(piece.encode("utf-16-le")) // 2 for piece in shown],
        "separatorGaps": np.diff(np.flatnonzero(is_separator), prepend=0).tolist(),
        "epochs": [{"start": epoch.start, "shift": epoch.shift} for epoch in epochs],
        "plot": {
            "left": LEFT,
            "top": TOP,
            "width": WIDTH,
            "height": HEIGHT,
            "viewWidth": VIEW_WIDTH,
        },
    }
    # most of it is the text: 100,000 tokens of a book are less than a megabyte
    compact = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return compact.replace("<", "\\u003c")


def _plot(lengths: IntArray, policy: Policy, epochs: Sequence[Epoch]) -> str:
    """Cache length over position, in both directions on one scale: [num_tokens] -> SVG."""
    num_tokens = len(lengths)
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    shapes = []
    for tick in _ticks(num_tokens):
        x, y = _x(tick, num_tokens), _y(tick, num_tokens)
        shapes.append(f'<path class="grid" d="M{LEFT} {y}H{right}M{x} {TOP}V{bottom}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:,}</text>')
        shapes.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{tick:,}</text>')
    width = round(WIDTH * min(policy.initial_tokens, num_tokens) / num_tokens, 1)
    shapes.append(f'<rect class="initial" x="{LEFT}" y="{TOP}" width="{width}" height="{HEIGHT}"/>')
    for epoch in epochs[1:]:
        x = _x(epoch.start, num_tokens)
        shapes.append(f'<path class="epoch" d="M{x} {TOP}V{bottom}"/>')
    end = _y(int(lengths[-1]), num_tokens)
    # names stand at the ends of the curves, apart even where the curves meet
    name_y = max(end + 4, TOP + 22)
    middle, foot = LEFT + WIDTH // 2, VIEW_HEIGHT - 2
    shapes += [
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"/>',
        f'<path class="full" d="M{LEFT} {bottom}L{right} {TOP}"/>',
        f'<path class="sepllm" d="{_curve(lengths)}"/>',
        f'<text class="name-full" x="{right + 8}" y="{TOP + 4}">full attention</text>',
        f'<text class="name-sepllm" x="{right + 8}" y="{name_y}">SepLLM {lengths[-1]:,}</text>',
        f'<text x="{middle}" y="{foot}" text-anchor="middle">tokens read</text>',
        f'<text transform="translate(10 {TOP + HEIGHT // 2}) rotate(-90)" '
        'text-anchor="middle">entries kept</text>',
        f'<line id="at" x1="{right}" x2="{right}" y1="{TOP}" y2="{bottom}"/>',
        f'<circle id="dot" cx="{right}" cy="{end}" r="4"/>',
    ]
    return (
        f'<svg id="plot" viewBox="0 0 {VIEW_WIDTH} {VIEW_HEIGHT}" role="img" '
        f'aria-label="Cache length over position: {lengths[-1]:,} entries after {num_tokens:,} '
        f'tokens">\n' + "\n".join(shapes) + "\n</svg>"
    )


def _x(num_read: int, num_tokens: int) -> float:
    return round(LEFT + WIDTH * num_read / num_tokens, 1)


def _y(num_kept: int, num_tokens: int) -> float:
    return round(TOP + HEIGHT * (1 - num_kept / num_tokens), 1)


def _curve(lengths: IntArray) -> str:
    """A path through at most some hundred of the lengths, the first and the last among them."""
    num_tokens = len(lengths)
    num_points = min(num_tokens, _MAX_POINTS)
    chosen = np.unique(np.linspace(0, num_tokens - 1, num_points).astype(np.int64))
    points = [f"{_x(i + 1, num_tokens)} {_y(int(lengths[i]), num_tokens)}" for i in chosen.tolist()]
    return f"M{LEFT} {TOP + HEIGHT}L" + "L".join(points)


def _ticks(num_tokens: int) -> list[int]:
    """Multiples of 1, 2 or 5 times a power of ten, at most six of them."""
    step = next(
        factor * 10**power
        for power in range(12)
        for factor in (1, 2, 5)
        if num_tokens / (factor * 10**power) <= 5
    )
    return list(range(0, num_tokens + 1, step))
