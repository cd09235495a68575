"""One HTML page of a text and what the cache keeps of it: no network, light and dark."""

import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np

from vllm_sepllm.policy.epochs import epochs_of
from vllm_sepllm.policy.kept import State, kept_lengths, token_states
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy

# sizes of the plot, in the units of its viewBox
VIEW_WIDTH, VIEW_HEIGHT = 1000, 190
LEFT, TOP, WIDTH, HEIGHT = 62, 12, 828, 148
_MAX_POINTS = 800
# C0 controls but tab, line feed and carriage return are not allowed in HTML
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)}


@cache
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
    """The whole page, showing the last position until its script has started.

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
    states = token_states(policy, is_separator, last)
    lengths = kept_lengths(policy, is_separator)
    counts = Counter(states.tolist())
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "initial": html.escape(initial),
        "style": asset("page.css"),
        "script": asset("page.js"),
        "last": str(last),
        "plot": _plot(lengths, _epoch_starts(policy, is_separator)),
        "note": f'<p class="note">{html.escape(note)}</p>' if note else "",
        "summary": f"The cache ends with {lengths[-1]:,} entries, full attention {last + 1:,}.",
        "tokens": "".join(map(_span, pieces, states.tolist(), is_separator.tolist())),
        "data": _data(is_separator, policy),
    }
    parts |= {f"count{state.value}": f"{counts[state.value]:,}" for state in State}
    # one pass, so that text that looks like a placeholder stays text
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], asset("page.html"))


def _span(piece: str, state: int, is_separator: bool) -> str:
    """One token: its line breaks get a visible sign, and one without text of its own a dot."""
    # lone surrogates cannot be written as UTF-8
    text = piece.translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")
    body = html.escape(text, quote=False).replace("\r", "&#13;").replace("\n", "<u></u>\n")
    mark = " data-s" if is_separator else ""
    return f'<span class="s{state}"{mark}>{body or "<i></i>"}</span>'


def _data(is_separator: BoolArray, policy: Policy) -> str:
    """What the script needs, as JSON that cannot close its element."""
    data = {
        "numTokens": len(is_separator),
        "initialTokens": policy.initial_tokens,
        "window": policy.window,
        "maxSeparators": policy.max_separators,
        "separators": np.flatnonzero(is_separator).tolist(),
        "plot": {
            "left": LEFT,
            "top": TOP,
            "width": WIDTH,
            "height": HEIGHT,
            "viewWidth": VIEW_WIDTH,
        },
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _epoch_starts(policy: Policy, is_separator: BoolArray) -> list[int]:
    """Where positions begin anew."""
    if policy.max_position is None:
        return []
    return [epoch.start for epoch in epochs_of(policy, is_separator)[1:]]


def _plot(lengths: IntArray, epoch_starts: Sequence[int]) -> str:
    """Cache length over position, in both directions on one scale: [num_tokens] -> SVG."""
    num_tokens = len(lengths)
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    shapes = []
    for tick in _ticks(num_tokens):
        x, y = _x(tick, num_tokens), _y(tick, num_tokens)
        shapes.append(f'<path class="grid" d="M{LEFT} {y}H{right}M{x} {TOP}V{bottom}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:,}</text>')
        shapes.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{tick:,}</text>')
    for start in epoch_starts:
        x = _x(start, num_tokens)
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
