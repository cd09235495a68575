"use strict";

// The rule of vllm_sepllm/policy/visibility.py; tests/cli/test_page.py compares the two.
// States: 0 initial, 1 kept separator, 2 window, 3 forgotten, 4 not yet read (policy/kept.py).
// A token's state costs the same in a text of any length: only what is on the screen is asked for.
function makeRule(data) {
  const { numTokens, initialTokens, window, maxSeparators, epochs } = data;
  const isSeparator = new Uint8Array(numTokens);
  let position = 0;
  for (const gap of data.separatorGaps) isSeparator[(position += gap)] = 1;
  // rank[j]: separators at positions in [initialTokens, j)
  const rank = new Uint32Array(numTokens + 1);
  for (let j = 0; j < numTokens; j++) {
    rank[j + 1] = rank[j] + (j >= initialTokens ? isSeparator[j] : 0);
  }
  const bound = maxSeparators === null ? Infinity : maxSeparators;
  const numLeft = (query) => rank[Math.max(0, query - window + 1)];

  return {
    isSeparator: (j) => isSeparator[j] === 1,
    // the token at position j as the query finds it
    state(query, j) {
      if (j > query) return 4;
      if (j < initialTokens) return 0;
      if (query - j < window) return 2;
      return isSeparator[j] && rank[j] >= numLeft(query) - bound ? 1 : 3;
    },
    // entries that the cache holds after the query
    length(query) {
      return Math.min(query + 1, initialTokens + window) + Math.min(numLeft(query), bound);
    },
    // tokens in each state
    counts(query) {
      const initial = Math.min(query + 1, initialTokens);
      const recent = Math.min(query + 1 - initial, window);
      const separators = Math.min(numLeft(query), bound);
      const rest = query + 1 - initial - recent - separators;
      return [initial, separators, recent, rest, numTokens - query - 1];
    },
    // index of the epoch of positions in which the query is computed
    epoch(query) {
      return lastBelow(epochs.length, (k) => epochs[k].start <= query);
    },
  };
}

// the last index in [0, count) of those for which a test holds, and it holds up to there; or 0
function lastBelow(count, holds) {
  let low = 0;
  let high = count - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (holds(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Where each row of the text begins: a token, and an offset in the whole text.
//   starts: [numTokens + 1], offsets of the tokens in the text; one without text takes one column
//   columns: that a row has
//   widthOf: columns that a character takes
// A row ends behind a line break, else behind its last space, else where it is full.
function makeRows(text, starts, columns, widthOf) {
  const tokens = [0];
  const offsets = [0];
  let column = 0;
  let gap = null; // behind the last space of the row
  const begin = (token, offset) => {
    tokens.push(token);
    offsets.push(offset);
    column = 0;
    gap = null;
  };
  const numTokens = starts.length - 1;
  for (let j = 0; j < numTokens; j++) {
    const end = starts[j + 1];
    if (starts[j] === end) column++;
    for (let at = starts[j]; at < end; ) {
      const character = String.fromCodePoint(text.codePointAt(at));
      const next = at + character.length;
      const after = next < end ? [j, next] : [j + 1, next];
      const width = character === "\t" ? 4 - (column % 4) : widthOf(character);
      // one space or the sign of a line break may hang over the edge
      while (column > 0 && column + (/[ \n]/.test(character) ? 0 : width) > columns) {
        if (gap === null) begin(j, at);
        else {
          const moved = column - gap.column;
          begin(gap.token, gap.offset);
          column = moved;
        }
      }
      column += width;
      if (character === "\n") begin(...after);
      else if (character === " ") gap = { token: after[0], offset: after[1], column };
      at = next;
    }
  }
  // a line break at the end begins no row of its own
  if (tokens.length > 1 && tokens.at(-1) === numTokens) {
    tokens.pop();
    offsets.pop();
  }
  return { tokens: Uint32Array.from(tokens), offsets: Uint32Array.from(offsets) };
}

// The row in which the text of a token begins.
function rowOf(rows, starts, token) {
  return lastBelow(
    rows.tokens.length,
    (r) => rows.tokens[r] < token || (rows.tokens[r] === token && rows.offsets[r] <= starts[token]),
  );
}

// Columns of a character, measured once each: ASCII has one.
function makeMeasure(font) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = font;
  const cell = context.measureText("0").width;
  const known = new Map();
  return (character) => {
    if (character >= " " && character <= "~") return 1;
    if (character === "\n") return 1; // its sign
    if (!known.has(character)) known.set(character, context.measureText(character).width / cell);
    return known.get(character);
  };
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { text, numTokens, epochs } = data;
  const element = (id) => document.getElementById(id);
  const rule = makeRule(data);
  const starts = new Uint32Array(numTokens + 1);
  data.lengths.forEach((length, j) => (starts[j + 1] = starts[j] + length));
  const epochStarts = new Set(epochs.slice(1).map((epoch) => epoch.start));
  const last = numTokens - 1;
  const number = new Intl.NumberFormat("en");
  const names = Array.from(document.querySelectorAll(".legend b"), (b) => b.textContent);
  const view = element("text");
  const measure = makeMeasure(getComputedStyle(view).font);
  const EXTRA = 6; // rows beyond the screen, so that a scroll finds them drawn
  const drawn = new Map(); // row -> its element, for the rows near the screen alone
  let rows = null;
  let numColumns = 0;
  let rowHeight = 0;
  let wanted = last;
  let isScheduled = false;
  let isFollowing = true;

  // rows for the width of the screen, unless it has those already
  function layOut() {
    const probe = element("rows").appendChild(document.createElement("div"));
    const cells = probe.appendChild(document.createElement("span"));
    cells.textContent = "0".repeat(100);
    rowHeight = probe.getBoundingClientRect().height;
    const cell = cells.getBoundingClientRect().width / 100;
    probe.remove();
    const columns = Math.max(8, Math.floor(element("rows").clientWidth / cell));
    if (columns === numColumns) return;
    numColumns = columns;
    element("rows").replaceChildren();
    drawn.clear();
    rows = makeRows(text, starts, columns, measure);
    element("rows").style.height = `${rows.tokens.length * rowHeight}px`;
    isFollowing = true;
  }

  // a row: the parts of its tokens, each an element
  function makeRow(r) {
    const row = document.createElement("div");
    row.style.top = `${r * rowHeight}px`;
    const isLast = r + 1 === rows.tokens.length;
    const end = isLast ? text.length : rows.offsets[r + 1];
    const stop = isLast ? numTokens : rows.tokens[r + 1];
    for (let j = rows.tokens[r]; j <= stop && j < numTokens; j++) {
      const from = Math.max(starts[j], rows.offsets[r]);
      const to = Math.min(starts[j + 1], end);
      // the next row's first token has no part in this one
      if (j === stop && from >= to) break;
      const span = document.createElement("span");
      span.dataset.token = j;
      if (rule.isSeparator(j)) span.dataset.s = "";
      if (epochStarts.has(j) && from === starts[j]) span.dataset.epoch = "";
      const part = text.slice(from, to);
      const body = part.endsWith("\n") ? part.slice(0, -1) : part;
      span.append(body);
      // a line break gets a visible sign, a token without text of its own a dot
      if (body !== part) span.append(document.createElement("u"));
      if (!part) span.append(document.createElement("i"));
      row.append(span);
    }
    return row;
  }

  // the elements of the rows near the screen, and of no others
  function drawRows() {
    const top = view.scrollTop - element("rows").offsetTop;
    const first = Math.max(0, Math.floor(top / rowHeight) - EXTRA);
    const end = Math.min(
      rows.tokens.length,
      Math.ceil((top + view.clientHeight) / rowHeight) + EXTRA,
    );
    for (const [r, row] of drawn) {
      if (r < first || r >= end) {
        row.remove();
        drawn.delete(r);
      }
    }
    let before = null;
    for (let r = first; r < end; r++) {
      if (!drawn.has(r)) {
        const row = makeRow(r);
        drawn.set(r, row);
        if (before) before.after(row);
        else element("rows").prepend(row);
      }
      before = drawn.get(r);
    }
  }

  function colour() {
    for (const row of drawn.values()) {
      for (const span of row.children) {
        const j = Number(span.dataset.token);
        const name = `s${rule.state(wanted, j)}${j === wanted ? " here" : ""}`;
        if (span.className !== name) span.className = name;
      }
    }
  }

  function plot(length) {
    const { left, top, width, height } = data.plot;
    const x = left + (width * (wanted + 1)) / numTokens;
    element("at").setAttribute("x1", x);
    element("at").setAttribute("x2", x);
    element("dot").setAttribute("cx", x);
    element("dot").setAttribute("cy", top + height * (1 - length / numTokens));
  }

  function say(length) {
    const share = ((100 * length) / (wanted + 1)).toFixed(1);
    const parts = [
      `After position ${number.format(wanted)} the cache holds ${number.format(length)} entries,` +
        ` full attention ${number.format(wanted + 1)} (${share} %).`,
    ];
    if (epochs.length > 0) {
      const k = rule.epoch(wanted);
      parts.push(
        `Its position there is ${number.format(wanted - epochs[k].shift)}, ` +
          `in epoch ${k + 1} of ${epochs.length}.`,
      );
    }
    element("summary").textContent = parts.join(" ");
    element("position").setAttribute("aria-valuetext", parts.join(" "));
  }

  // the row of the position stands as low on the screen as there is room below it
  function bringIntoView() {
    const row = rowOf(rows, starts, wanted);
    const bottom = element("rows").offsetTop + (row + 1) * rowHeight;
    view.scrollTop = bottom + 3 * rowHeight - view.clientHeight;
  }

  function render() {
    isScheduled = false;
    if (isFollowing) bringIntoView();
    isFollowing = false;
    drawRows();
    colour();
    const length = rule.length(wanted);
    rule.counts(wanted).forEach((count, k) => {
      element(`count${k}`).textContent = number.format(count);
    });
    say(length);
    plot(length);
  }

  function schedule() {
    if (!isScheduled) requestAnimationFrame(render);
    isScheduled = true;
  }

  function go(position) {
    if (!Number.isFinite(position)) return;
    wanted = Math.min(last, Math.max(0, Math.round(position)));
    element("position").value = wanted;
    element("number").value = wanted;
    isFollowing = element("follow").checked;
    schedule();
  }

  // the position as many rows further, as far from its row's start
  function goRows(count) {
    const row = rowOf(rows, starts, wanted);
    const target = Math.min(rows.tokens.length - 1, Math.max(0, row + count));
    if (target === row) return go(count < 0 ? 0 : last);
    const end = target + 1 < rows.tokens.length ? rows.tokens[target + 1] - 1 : last;
    go(Math.min(Math.max(end, rows.tokens[target]), rows.tokens[target] + wanted - rows.tokens[row]));
  }

  const keys = {
    ArrowLeft: () => go(wanted - 1),
    ArrowRight: () => go(wanted + 1),
    ArrowUp: () => goRows(-1),
    ArrowDown: () => goRows(1),
    PageUp: () => goRows(-Math.max(1, Math.floor(view.clientHeight / rowHeight) - 1)),
    PageDown: () => goRows(Math.max(1, Math.floor(view.clientHeight / rowHeight) - 1)),
    Home: () => go(0),
    End: () => go(last),
  };
  addEventListener("keydown", (event) => {
    // a field with a number has its own use for them
    if (event.target === element("number") || event.ctrlKey || event.altKey || event.metaKey) return;
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  element("position").addEventListener("input", (event) => go(event.target.valueAsNumber));
  element("number").addEventListener("change", (event) => go(event.target.valueAsNumber));
  element("plot").addEventListener("click", (event) => {
    const box = element("plot").getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * data.plot.viewWidth;
    go(((x - data.plot.left) / data.plot.width) * numTokens - 1);
  });
  const tokenAt = (event) => event.target.closest("#rows span")?.dataset.token;
  view.addEventListener("click", (event) => {
    if (tokenAt(event) !== undefined && !String(getSelection())) go(Number(tokenAt(event)));
  });
  view.addEventListener("mouseover", (event) => {
    const j = tokenAt(event);
    element("hover").textContent =
      j === undefined
        ? ""
        : `${number.format(j)}: ${JSON.stringify(text.slice(starts[j], starts[Number(j) + 1]))}, ` +
          names[rule.state(wanted, Number(j))];
  });
  view.addEventListener("scroll", schedule);
  new ResizeObserver(() => {
    layOut();
    schedule();
  }).observe(view);
  const fromHash = () => (location.hash.length > 1 ? Number(location.hash.slice(1)) : last);
  addEventListener("hashchange", () => go(fromHash()));
  layOut();
  go(fromHash());
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { makeRule, makeRows, rowOf };
