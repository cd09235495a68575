"use strict";

// The rule of vllm_sepllm/policy/visibility.py; tests/cli/test_page.py compares the two.
// States: 0 initial, 1 kept separator, 2 window, 3 forgotten, 4 not yet read (policy/kept.py).
function makeRule(data) {
  const { numTokens, initialTokens, window, maxSeparators, separators } = data;
  const isSeparator = new Uint8Array(numTokens);
  for (const position of separators) isSeparator[position] = 1;
  // rank[j]: separators at positions in [initialTokens, j)
  const rank = new Uint32Array(numTokens + 1);
  for (let j = 0; j < numTokens; j++) {
    rank[j + 1] = rank[j] + (j >= initialTokens ? isSeparator[j] : 0);
  }
  const bound = maxSeparators === null ? Infinity : maxSeparators;
  const numLeft = (query) => rank[Math.max(0, query - window + 1)];

  return {
    // the state of every token for the query at a position, written into `out`
    fill(query, out) {
      const oldest = numLeft(query) - bound;
      for (let j = 0; j < numTokens; j++) {
        if (j > query) out[j] = 4;
        else if (j < initialTokens) out[j] = 0;
        else if (query - j < window) out[j] = 2;
        else out[j] = isSeparator[j] && rank[j] >= oldest ? 1 : 3;
      }
      return out;
    },
    // entries that the cache holds after the query
    length(query) {
      return Math.min(query + 1, initialTokens + window) + Math.min(numLeft(query), bound);
    },
  };
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const rule = makeRule(data);
  const spans = element("text").children;
  const last = data.numTokens - 1;
  const number = new Intl.NumberFormat("en");
  let shown = new Uint8Array(data.numTokens).fill(255);
  let next = new Uint8Array(data.numTokens);
  let here = null;
  let wanted = last;
  let isScheduled = false;

  function plot(position, length) {
    const { left, top, width, height } = data.plot;
    const x = left + (width * (position + 1)) / data.numTokens;
    element("at").setAttribute("x1", x);
    element("at").setAttribute("x2", x);
    element("dot").setAttribute("cx", x);
    element("dot").setAttribute("cy", top + height * (1 - length / data.numTokens));
  }

  function render() {
    isScheduled = false;
    const position = wanted;
    rule.fill(position, next);
    const counts = [0, 0, 0, 0, 0];
    for (let j = 0; j < next.length; j++) {
      counts[next[j]]++;
      // only what changed is touched: that keeps 8,000 tokens fluid
      if (next[j] !== shown[j]) spans[j].className = "s" + next[j];
    }
    [shown, next] = [next, shown];
    counts.forEach((count, k) => (element("count" + k).textContent = number.format(count)));
    const length = rule.length(position);
    const share = ((100 * length) / (position + 1)).toFixed(1);
    element("summary").textContent =
      `After position ${number.format(position)} the cache holds ${number.format(length)} entries,` +
      ` full attention ${number.format(position + 1)} (${share} %).`;
    if (here) here.classList.remove("here");
    here = spans[position];
    here.classList.add("here");
    plot(position, length);
    if (element("follow").checked) here.scrollIntoView({ block: "end" });
  }

  function go(position) {
    if (!Number.isFinite(position)) return;
    wanted = Math.min(last, Math.max(0, Math.round(position)));
    element("position").value = wanted;
    element("number").value = wanted;
    if (!isScheduled) requestAnimationFrame(render);
    isScheduled = true;
  }

  element("position").addEventListener("input", (event) => go(event.target.valueAsNumber));
  element("number").addEventListener("change", (event) => go(event.target.valueAsNumber));
  element("plot").addEventListener("click", (event) => {
    const box = element("plot").getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * data.plot.viewWidth;
    go(((x - data.plot.left) / data.plot.width) * data.numTokens - 1);
  });
  const index = new Map(Array.from(spans, (span, j) => [span, j]));
  const tokenAt = (event) => index.get(event.target.closest("main > span"));
  element("text").addEventListener("click", (event) => {
    if (tokenAt(event) !== undefined && !String(getSelection())) go(tokenAt(event));
  });
  element("text").addEventListener("mouseover", (event) => {
    const j = tokenAt(event);
    element("hover").textContent =
      j === undefined ? "" : `${number.format(j)}: ${JSON.stringify(spans[j].textContent)}`;
  });
  const fromHash = () => (location.hash.length > 1 ? Number(location.hash.slice(1)) : last);
  addEventListener("hashchange", () => go(fromHash()));
  go(fromHash());
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { makeRule };
