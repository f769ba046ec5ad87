// The explorer's front end: one anywidget module, no libraries, no network.
// The kernel computes; this file asks (one move in flight at most) and draws.
// Messages change `state`, then one animation frame paints what became dirty.
// Nodes are made once and updated in place, so that a slider feels like a slider.

// ---------------------------------------------------------------- small tools

const SVG = "http://www.w3.org/2000/svg";
const FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif";
const INK = { text: "#1b2733", muted: "#56657a", grid: "#e1e6ec", track: "#e6ebf0", grey: "#98a6b5", pale: "#eef2f6",
  blue: "#0072B2", vermillion: "#D55E00", vermillionText: "#b34a00", amber: "#E69F00", green: "#009E73" };

let made = 0;                                    // a fresh suffix for each id in the page, where every panel has a copy of this module
const mine = Math.random().toString(36).slice(2, 8), uid = (word) => `pnl-${word}-${mine}-${++made}`;

function assign(node, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === false || value == null) node.removeAttribute(key);
    else node.setAttribute(key, value === true ? "" : value);
  }
  return node;
}
const h = (tag, attributes = {}, ...children) => {
  const node = assign(document.createElement(tag), attributes);
  node.append(...children.filter((c) => c != null));
  return node;
};
const s = (tag, attributes = {}, ...children) => {
  const node = assign(document.createElementNS(SVG, tag), attributes);
  node.append(...children);
  return node;
};
const write = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const clamp = (x, lo, hi) => Math.min(hi, Math.max(lo, x));
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const short = (x) => String(Number(x.toPrecision(3))).replace("-", "−");

function byteText(bytes) {
  if (bytes < 1e3) return `${Math.round(bytes)} B`;
  if (bytes < 1e6) return `${short(bytes / 1e3)} kB`;
  return `${short(bytes / 1e6)} MB`;
}

/** Make a table body say `rows` (arrays of strings), touching only cells that differ. */
function fillRows(body, rows) {
  while (body.rows.length > rows.length) body.lastChild.remove();
  rows.forEach((row, i) => {
    const tr = body.rows[i] ?? body.appendChild(h("tr"));
    while (tr.cells.length > row.length) tr.lastChild.remove();
    row.forEach((text, j) => {
      const cell = tr.cells[j] ?? tr.appendChild(j ? h("td") : h("th", { scope: "row" }));
      write(cell, String(text ?? ""));
    });
  });
}

function makeTable(caption, heads, attributes = {}) {
  const body = h("tbody");
  const headRow = h("tr");
  const node = h("table", attributes, h("caption", {}, caption), h("thead", {}, headRow), body);
  const head = (texts) => texts.join() !== [...headRow.cells].map((c) => c.textContent).join() && headRow.replaceChildren(...texts.map((t) => h(t ? "th" : "td", t ? { scope: "col" } : {}, t)));
  head(heads);
  return { node, body, head, fill: (rows) => fillRows(body, rows) };
}

/** Keep one maker's nodes for each item: call `update` on old ones, make or drop the rest. */
function fillList(parent, items, make) {
  parent.parts ??= [];
  while (parent.parts.length > items.length) parent.parts.pop().node.remove();
  items.forEach((item, i) => {
    if (!parent.parts[i]) parent.append((parent.parts[i] = make()).node);
    parent.parts[i].update(item);
  });
}

// ------------------------------------------------------- asking: flow control

/** At most one unanswered move in flight; meanwhile only the newest is remembered. */
function makeAsker(send, onBusy) {
  let newest = 0, flight = null, waiting = null, slow = 0, lost = 0;
  const quiet = () => { clearTimeout(slow); clearTimeout(lost); onBusy(false); };

  function launch(move, patience = 5000) {
    flight = move;
    waiting = null;
    clearTimeout(lost);
    if (patience === 5000) slow = setTimeout(onBusy, 2000, true);
    lost = setTimeout(() => launch(waiting ?? flight, 2 * patience), patience);   // 5 s, 10 s, 20 s …
    send(move);
  }
  return {
    get newest() { return newest; },
    ask(move) {
      move.seq = ++newest;
      if (flight) waiting = move; else launch(move);
    },
    ready(move) { launch({ ...move, type: "ready", seq: newest }); },
    answered(seq) {
      newest = Math.max(newest, seq);
      if (!flight || seq < flight.seq) return;
      quiet();
      flight = null;
      if (waiting) launch(waiting);
    },
    stop: quiet,
  };
}

// --------------------------------------------------------------------- knobs

/** The values a slider stops at: 201 on a log or linear scale, or the integers. */
function ladder({ lo, hi, log, integer }) {
  const at = (t) => (log && lo > 0 ? lo * (hi / lo) ** t : lo + (hi - lo) * t);
  const count = integer && hi - lo <= 200 && !log ? hi - lo : log ? 210 : 200;  // 70 a decade from .001 to 1: .01 and .1 are stops
  const round = integer ? Math.round : (x) => Number(x.toPrecision(log ? 3 : 4));
  const values = Array.from({ length: count + 1 }, (_, i) => round(at(i / count)));
  return [...new Set(values)];
}
const nearest = (steps, value) =>
  steps.reduce((best, step, i) => (Math.abs(step - value) < Math.abs(steps[best] - value) ? i : best), 0);

function knobText(knob, value) {
  if (knob.kind === "pick") return String(value);
  return String(knob.integer ? value : Number(value.toPrecision(6)));
}

function makeSpan(knob, hinted, onMove) {
  const steps = ladder(knob);
  const [id, hintId] = [uid("knob"), uid("hint")];
  let value = knob.value;

  const range = h("input", { type: "range", id, min: 0, max: steps.length - 1, step: 1, "data-role": `knob-${knob.name}`,
    "aria-describedby": hinted ? hintId : null, oninput: () => move(steps[range.valueAsNumber]) });
  const exact = h("input", { type: "number", class: "pnl-exact", min: knob.lo, max: knob.hi, step: knob.integer ? 1 : "any",
    "aria-label": `${knob.label}, exact value`, "data-role": `exact-${knob.name}`, onchange: typed });

  function typed() {
    const wish = exact.valueAsNumber;
    if (Number.isNaN(wish)) return show();
    move(clamp(knob.integer ? Math.round(wish) : wish, knob.lo, knob.hi));
  }
  function hop(event, jump) {                    // the browser's own page step is a tenth of the range
    event.preventDefault();
    const at = clamp(nearest(steps, value) + jump, 0, steps.length - 1);
    if (steps[at] !== value) move(steps[at]);
  }
  const jumps = { PageUp: 10, PageDown: -10 };
  range.addEventListener("keydown", (e) => jumps[e.key] && hop(e, jumps[e.key]));
  exact.addEventListener("keydown", (e) => {
    const jump = { ...jumps, ArrowUp: 1, ArrowDown: -1 }[e.key];
    if (jump) hop(e, jump);
  });
  function show() {
    const text = knobText(knob, value);
    range.value = nearest(steps, value);
    range.style.setProperty("--fill", `${(100 * range.value) / (steps.length - 1)}%`);
    range.setAttribute("aria-valuetext", text);
    exact.value = text;
  }
  function move(next) { value = next; show(); onMove(); }

  show();
  const node = h("div", { class: "pnl-knob pnl-span" },
    h("div", { class: "pnl-knob-top" }, h("label", { for: id }, knob.label), exact), range,
    h("div", { class: "pnl-hint", id: hintId }, h("span", {}, short(knob.lo)),
      hinted ? h("span", {}, "← → one step, PgUp PgDn ten") : null, h("span", {}, short(knob.hi))));
  return { node, get: () => value, set: (next) => { value = next; show(); } };
}

function makePick(knob, onMove, role = `knob-${knob.name}`) {
  const id = uid("knob");
  const select = h("select", { id, "data-role": role, onchange: onMove },
    ...knob.choices.map((choice, i) => h("option", { value: i }, String(choice))));
  const set = (value) => { select.selectedIndex = Math.max(0, knob.choices.indexOf(value)); };
  set(knob.value);
  return { node: h("div", { class: "pnl-knob pnl-pick" }, h("label", { for: id }, knob.label), select),
    get: () => knob.choices[select.selectedIndex], set };
}

function makeSeed(seed, onChange) {
  const name = uid("seed");
  return h("fieldset", { class: "pnl-seed", "data-role": "seed" }, h("legend", {}, "seed"),
    ...seed.choices.map((choice) => h("label", {},
      h("input", { type: "radio", name, value: choice, checked: choice === seed.value, onchange: () => onChange(choice) }),
      h("span", {}, String(choice)))));
}

// -------------------------------------------------------------------- pixels

const mix = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));
const ramp = (stops) => Uint32Array.from({ length: 256 }, (_, i) => {
  const at = (i / 255) * (stops.length - 1), k = Math.min(Math.floor(at), stops.length - 2);
  const [r, g, b] = mix(stops[k], stops[k + 1], at - k);
  return (255 << 24) | (b << 16) | (g << 8) | r;  // little-endian RGBA
});
const [BLUE, VERMILLION, PALE] = [[0, 114, 178], [213, 94, 0], [240, 243, 247]];
const PALETTES = {
  sequential: ramp([[250, 252, 254], [148, 196, 226], BLUE, [0, 58, 102]]),
  diverging: ramp([[0, 84, 140], [30, 136, 196], PALE, [230, 128, 50], [190, 76, 0]]),
  grey: ramp([[0, 0, 0], [255, 255, 255]]),
};

/** A canvas of n pictures side by side; takes one byte a pixel (palette) or three (RGB). */
function makePixels(attributes = {}) {
  const canvas = h("canvas", { role: "img", ...attributes });
  const pen = canvas.getContext("2d");
  let image = null, colours = null;

  function draw(view, { n = 1, w, h: high, palette = "sequential" }, first = 0) {
    const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    const gap = n > 1 ? Math.max(1, Math.round(w * 0.12)) : 0, wide = n * w + (n - 1) * gap;
    if (image?.width !== wide || image?.height !== high) {
      [canvas.width, canvas.height] = [wide, high];
      image = pen.createImageData(wide, high);
      colours = new Uint32Array(image.data.buffer);
      canvas.classList.toggle("pnl-smooth", wide > 400);
    }
    const table = PALETTES[palette] ?? PALETTES.sequential;
    const rgb = view.byteLength % (3 * w * high) === 0 && palette === "rgb";
    for (let k = 0; k < n; k++) for (let y = 0; y < high; y++) {
      let from = ((first + k) * high + y) * w, to = y * wide + k * (w + gap);
      for (const end = from + w; from < end; from++, to++)
        colours[to] = rgb ? 0xff000000 | (bytes[3 * from + 2] << 16) | (bytes[3 * from + 1] << 8) | bytes[3 * from] : table[bytes[from]];
    }
    pen.putImageData(image, 0, 0);
  }
  return { canvas, draw };
}

// --------------------------------------------------------------------- cards
// Each maker returns {node, update(card, buffers)}; a card that keeps its kind keeps its nodes.

/** The ends of an axis and, where there is room between them, its zero. */
const makeEnds = () => h("div", { class: "pnl-ends", "aria-hidden": true }, h("span"), h("span"), h("span"));
function showEnds({ children: [left, zero, right] }, lo, hi) {
  const at = (-100 * lo) / (hi - lo);
  write(left, short(lo)); write(right, short(hi)); write(zero, at > 25 && at < 75 ? "0" : "");
  zero.style.left = `${at}%`;
}

function histogramCard() {
  const grey = s("path", { fill: "#c3ccd6" }), blue = s("path", { fill: INK.blue }), axis = s("path", { stroke: INK.grey, "vector-effect": "non-scaling-stroke" });
  const cuts = s("path", { stroke: INK.vermillion, "stroke-width": 2, "vector-effect": "non-scaling-stroke" });
  const sticks = s("path", { stroke: INK.blue, "vector-effect": "non-scaling-stroke" });
  const svg = s("svg", { preserveAspectRatio: "none", role: "img" }, grey, blue, axis, sticks, cuts);
  const rail = h("div", { class: "pnl-cut-rail" }), label = () => { const node = h("div", { class: "pnl-cut" }); return { node, update: (at) => place(node, at) }; };
  const ends = makeEnds(), caption = h("figcaption"), node = h("figure", { class: "pnl-card pnl-histogram" }, rail, svg, ends, caption);

  const bars = (counts, most) => counts.map((c, i) => (c ? `M${i + 0.07} 100V${100 - 96 * Math.sqrt(c / most)}h.86V100z` : "")).join("");
  // left p % of the rail and back p % of the label's own width: never over the edge
  function place(node, { text, p }) {
    Object.assign(node.style, { left: `${p}%`, transform: `translateX(-${p}%)` });
    write(node, text);
  }
  function update(card) {
    const n = card.counts.length, [a, b] = card.edges, [lo, hi] = card.span ?? card.edges, most = Math.max(1, ...card.counts);
    const x = (value) => (n * (value - a)) / (b - a), p = (value) => clamp((100 * (value - lo)) / (hi - lo), 0, 100);
    const lines = (values) => values.filter((v) => v >= lo && v <= hi).map((v) => `M${x(v)} 0V100`).join("");
    const levels = card.sticks ?? [], highest = Math.max(1, ...levels.map(([, count]) => count));
    assign(svg, { viewBox: `${x(lo)} 0 ${x(hi) - x(lo)} 100`, "aria-label": card.alt ?? `Histogram: ${card.caption}. ${card.cut_label ?? ""}` });
    assign(grey, { d: bars(card.counts, most) });
    assign(blue, { d: bars(card.kept ?? [], most) });
    assign(axis, { d: `M${x(lo)} 100H${x(hi)}` });
    // a level that no weight took is a tick
    assign(sticks, { d: levels.map(([v, count]) => `M${x(v)} 100V${Math.min(96, 100 - 96 * Math.sqrt(count / highest))}`).join(""), "stroke-width": levels.length > 64 ? 1 : levels.length > 16 ? 1.6 : 3 });
    assign(cuts, { d: card.cut == null ? "" : lines([-card.cut, card.cut]) });
    const named = levels.filter(([, , text]) => text).map(([v, , text]) => ({ text, p: p(v) }));
    fillList(rail, card.cut_label ? [...named, { text: card.cut_label, p: card.cut == null ? 50 : p(card.cut) }] : named, label);
    showEnds(ends, lo, hi);
    write(caption, card.caption ?? "");
  }
  return { node, update };
}

/** What a value becomes: a line where all of a bar become one, a box where they become several; the diagonal would change nothing. */
function stairsCard() {
  const line = (attributes) => s("path", { "stroke-width": 1.6, "vector-effect": "non-scaling-stroke", ...attributes });
  const same = line({ stroke: "#c3ccd6" }), steps = line({ stroke: INK.blue, "stroke-linejoin": "round", fill: "#7fb8d8" });
  const svg = s("svg", { preserveAspectRatio: "none", role: "img" }, same, steps), caption = h("figcaption");
  const ends = makeEnds(), node = h("figure", { class: "pnl-card pnl-histogram pnl-stairs" }, svg, ends, caption);
  function update(card) {
    const [lo, hi] = card.edges, low = Math.min(lo, ...card.steps.map(([, v]) => v)), high = Math.max(hi, ...card.steps.map(([, , v]) => v));
    const y = (value) => 98 - (96 * (value - low)) / (high - low), n = card.bins;
    assign(svg, { viewBox: `0 0 ${n} 100`, "aria-label": card.alt ?? card.caption });
    assign(same, { d: `M0 ${y(lo)}L${n} ${y(hi)}` });
    assign(steps, { d: card.steps.map(([i, a, b]) => `M${i} ${y(a)}H${i + 1}V${y(b)}H${i}z`).join("") });
    showEnds(ends, lo, hi);
    write(caption, card.caption ?? "");
  }
  return { node, update };
}

function imageCard() {
  const pixels = makePixels(), caption = h("figcaption");
  const node = h("figure", { class: "pnl-card pnl-image" }, pixels.canvas, caption);
  function update(card, buffers) {
    pixels.draw(buffers[card.buffer], card);
    assign(pixels.canvas, { "aria-label": card.alt ?? card.caption });
    node.classList.toggle("pnl-wide", card.w > 1.8 * card.h);
    write(caption, card.caption ?? "");
  }
  return { node, update };
}

function stripCard() {
  const before = makePixels(), after = makePixels(), caption = h("figcaption"), captionAfter = h("figcaption");
  const node = h("div", { class: "pnl-card pnl-strip", role: "group" }, caption, before.canvas, after.canvas, captionAfter);
  function update(card, buffers) {
    before.draw(buffers[card.before], card);
    after.draw(buffers[card.after], card);
    assign(before.canvas, { "aria-label": `${card.alt ?? card.caption}: before` });
    assign(after.canvas, { "aria-label": `${card.alt ?? card.caption}: after` });
    write(caption, card.caption ?? "");
    write(captionAfter, card.caption_after ?? "… and after");
  }
  return { node, update };
}

function barRow() {
  const label = h("span"), fill = h("i"), text = h("span", { class: "pnl-number" });
  const node = h("li", {}, label, h("span", { class: "pnl-bar" }, fill), text);
  return { node, update(row) {
    write(label, row.label);
    write(text, row.text ?? percent(row.share));
    fill.style.width = `${100 * clamp(row.share, 0, 1)}%`;
  } };
}
function barsCard() {
  const title = h("h3"), list = h("ul", { class: "pnl-bars" });
  return { node: h("div", { class: "pnl-card" }, title, list), update(card) {
    write(title, card.title);
    fillList(list, card.rows, barRow);
  } };
}

const CARDS = { histogram: histogramCard, stairs: stairsCard, image: imageCard, strip: stripCard, bars: barsCard };

/** Three pictures in the first column and the bars under the path; with more pictures, those go there and the bars change sides. */
function makeCards(first, second) {
  let kept = [];
  return function update(cards, buffers) {
    const kinds = cards.map((card) => card.kind).join();
    if (kinds !== kept.map((one) => one.kind).join()) {
      kept.forEach((one) => one.node.remove());
      kept = cards.map(({ kind }) => ({ kind, ...(CARDS[kind] ?? imageCard)() }));
      const pictures = kept.filter((one) => one.kind !== "bars"), others = kept.filter((one) => one.kind === "bars");
      const spilt = pictures.slice(3);
      first.append(...[...pictures.slice(0, 3), ...(spilt.length ? others : [])].map((one) => one.node));
      second.append(...(spilt.length ? spilt : others).map((one) => one.node));
    }
    kept.forEach((one, i) => one.update(cards[i], buffers));
  };
}

// ----------------------------------------------------------------- path plot
// Drawn by attributes only (no style sheet), so that the saved SVG looks the same.
// One unit is a thirteenth of an em: text keeps its size beside the panel's.

const Y_TICKS = [0.9, 0.5, 0.3, 0.7, 0.98, 0.95, 0.1, 0, 0.99, 1];    // the important ones first
const stretch = (accuracy) => -Math.log10(1.02 - accuracy);           // stretched near 100 %
const known = (point) => point?.accuracy != null;

function makePlot() {
  const layers = ["grid", "path", "marks", "now"].map(() => s("g"));
  const [grid, path, marks, now] = layers;
  const svg = s("svg", { role: "img", "font-family": FONT, "font-size": 12, "data-role": "plot" }, ...layers);
  let width = 400, height = 250, drawn = "", reach = null, obstacles = [];

  const frame = () => ({ left: 44, right: width - 8, top: 19, bottom: height - 24 });

  /** The domain only grows (until the path is cleared): axes that jump cannot be read. */
  function extend({ dense, published, stored, walked, pins, point, guess }, accuracies) {
    const points = [dense, ...published, ...stored, ...walked, ...pins.map((p) => p.point), point, guess].filter((p) => p?.bytes > 0);
    const sizes = points.map((p) => p.bytes);
    reach ??= { lo: dense ? dense.bytes / 24 : Infinity, hi: 0, floor: 0.3, top: 0 };
    reach.lo = Math.min(reach.lo, ...sizes.map((b) => b / 1.5));
    reach.hi = Math.max(reach.hi, ...sizes.map((b) => b * 1.25), 2 * reach.lo);
    const lowest = Math.min(1, ...accuracies), highest = Math.max(0, ...accuracies);
    reach.floor = Math.min(reach.floor, lowest < 0.1 ? 0 : lowest < 0.3 ? 0.1 : 0.3);
    reach.top = Math.max(reach.top, highest > 0.93 ? 1 : Math.min(1, highest + 0.06));
  }
  const X = (bytes) => {
    const { left, right } = frame();
    return left + ((right - left) * Math.log(bytes / reach.lo)) / Math.log(reach.hi / reach.lo);
  };
  const Y = (accuracy) => {
    const { top, bottom } = frame(), [lo, hi] = [stretch(reach.floor) - 0.04, stretch(reach.top)];
    return clamp(bottom - ((bottom - top) * (stretch(accuracy) - lo)) / (hi - lo), top, bottom);
  };

  function drawGrid() {
    const { left, right, top, bottom } = frame(), nodes = [], taken = [];
    for (const tick of Y_TICKS) {
      if (tick < reach.floor || tick > reach.top || taken.some((y) => Math.abs(y - Y(tick)) < 13)) continue;
      taken.push(Y(tick));
      nodes.push(s("path", { d: `M${left} ${Y(tick)}H${right}`, stroke: INK.grid }),
        s("text", { x: left - 5, y: Y(tick) + 4, "text-anchor": "end", fill: INK.muted }, `${Math.round(100 * tick)} %`));
    }
    let last = -Infinity;
    for (let decade = Math.floor(Math.log10(reach.lo)); decade <= Math.log10(reach.hi); decade++) for (const lead of [1, 3]) {
      const bytes = lead * 10 ** decade, x = X(bytes);
      if (x < left + 2 || x > right || x - last < 44) continue;
      last = x;
      nodes.push(s("path", { d: `M${x} ${top}V${bottom}`, stroke: INK.grid }),
        s("text", { x: Math.min(x, right - 16), y: bottom + 17, "text-anchor": "middle", fill: INK.muted }, byteText(bytes)));
    }
    nodes.push(s("path", { d: `M${left} ${bottom}H${right}`, stroke: INK.grey }));
    // said in the picture, so that a saved one says it too
    nodes.push(s("text", { x: right, y: top - 6, "text-anchor": "end", "font-size": 10.5, fill: INK.muted }, "accuracy stretched near 100 %"));
    grid.replaceChildren(...nodes);
  }

  /** Put a text near (x, y) where it covers least of what is already there. */
  function caption(text, x, y, taken, more = {}) {
    const { left, right, top, bottom } = frame(), wide = text.length * (more["font-weight"] ? 7.4 : 6.7), high = 14;
    const spots = [[10, 18], [-wide - 10, 18], [12, -4], [-wide - 12, -4], [-wide / 2, 26], [-wide / 2, -12], [10, 32], [-wide - 10, 32], [-wide / 2, 42], [-wide / 2, -28]];
    let best = null;
    spots.forEach(([dx, dy], i) => {
      const x0 = clamp(x + dx, left + 2, right - wide), y1 = y + dy + 3, y0 = y1 - high;
      const cover = ([a, b, c, d]) => Math.max(0, Math.min(c, x0 + wide) - Math.max(a, x0)) * Math.max(0, Math.min(d, y1) - Math.max(b, y0));
      const cost = taken.reduce((sum, box) => sum + cover(box), 6 * i) + (y0 < top - 3 || y1 > bottom ? 4000 : 0) + 3 * Math.abs(x0 - x - dx);
      if (!best || cost < best.cost) best = { cost, x0, y1, box: [x0, y0, x0 + wide, y1] };
    });
    taken.push(best.box);
    return s("text", { x: best.x0, y: best.y1 - 3, fill: INK.muted, stroke: "#fff", "stroke-width": 3, "paint-order": "stroke", ...more }, text);
  }
  const boxAt = (x, y, r = 7) => [x - r, y - r, x + r, y + r];

  function drawPath(walked) {
    const tint = (i) => `rgb(${mix([152, 166, 181], BLUE, walked.length < 2 ? 1 : i / (walked.length - 1)).join()})`;
    const dots = walked.map((p, i) => s("circle", { cx: X(p.bytes), cy: Y(p.accuracy), r: 3.6, fill: tint(i) },
      s("title", {}, `${percent(p.accuracy, 2)} · ${byteText(p.bytes)}`)));
    const legs = walked.slice(1).map((p, i) => s("path", { "stroke-width": 2, stroke: tint(i + 1),
      d: `M${X(walked[i].bytes)} ${Y(walked[i].accuracy)}L${X(p.bytes)} ${Y(p.accuracy)}` }));
    path.replaceChildren(...legs, ...dots);
    walked.slice(-40).forEach((p, i, near) => {  // labels keep off the dots and, at some places, off the legs
      const [x, y, from] = [X(p.bytes), Y(p.accuracy), near[Math.max(0, i - 1)]];
      for (const t of [0, 0.2, 0.4, 0.6, 0.8])
        obstacles.push(boxAt(x + t * (X(from.bytes) - x), y + t * (Y(from.accuracy) - y), 4));
    });
  }

  /** A pin is a flag above its point, or below where there is no room, so that "now" does not cover it. */
  function flag(x, y, letter) {
    const at = y < 36 ? y + 22 : y - 22;
    obstacles.push(boxAt(x, at, 9));
    return s("g", {}, s("path", { d: `M${x} ${y}V${at}`, stroke: INK.text, "stroke-width": 1.5 }), s("circle", { cx: x, cy: y, r: 3, fill: INK.text }),
      s("rect", { x: x - 8, y: at - 8, width: 16, height: 16, rx: 3, fill: INK.text }),
      s("text", { x, y: at + 4.5, "text-anchor": "middle", fill: "#fff", "font-weight": "bold" }, letter));
  }

  /** Runs that were trained once and kept: hollow points on a broken line. */
  function drawStored(runs) {
    const at = [...runs].sort((a, b) => a.bytes - b.bytes).map((run) => ({ x: X(run.bytes), y: Y(run.accuracy), run }));
    if (!at.length) return [];
    obstacles.push(...at.map(({ x, y }) => boxAt(x, y, 6)));
    return [s("path", { d: `M${at.map(({ x, y }) => `${x} ${y}`).join("L")}`, fill: "none", stroke: INK.muted, "stroke-width": 1.4, "stroke-dasharray": "5 3" }),
      ...at.map(({ x, y, run }) => s("circle", { cx: x, cy: y, r: 4, fill: "#fff", stroke: INK.muted, "stroke-width": 1.8 }, s("title", {}, `stored: ${percent(run.accuracy, 2)} · ${byteText(run.bytes)} · ${stateText(run)}`))),
      caption("stored runs", at[0].x, at[0].y, obstacles)];
  }

  function drawMarks({ dense, published, stored, guess, pins }, veil) {
    const marked = [], runs = drawStored(veil ? [] : stored);
    const mark = (point, text, shape) => marked.push({ x: X(point.bytes), y: Y(point.accuracy), text, shape });
    if (dense) mark(dense, "dense", (x, y) => s("path", { d: `M${x} ${y - 7}l7 12h-14z`, fill: INK.text }));
    for (const p of published) mark(p, p.label, (x, y) => s("path", { d: `M${x} ${y - 8}l8 8l-8 8l-8 -8z`, fill: "#fff", stroke: INK.green, "stroke-width": 2.2 }));
    if (guess?.bytes) mark(guess, `your guess ${Math.round(100 * guess.accuracy)} %`, (x, y) => s("path", { d: `M${x - 6} ${y - 6}l12 12m0 -12l-12 12`, stroke: INK.amber, "stroke-width": 3.2 }));
    for (const pin of veil ? [] : pins) if (known(pin.point)) mark(pin.point, "", (x, y) => flag(x, y, pin.label));
    obstacles.push(...marked.map(({ x, y }) => boxAt(x, y, 9)));
    marks.replaceChildren(...runs, ...marked.map(({ x, y, shape }) => shape(x, y)),
      ...marked.filter((m) => m.text).map(({ x, y, text }) => caption(text, x, y, obstacles)));
  }

  /** The present state: on the axis while unknown, then with an error bar, then with a full centre. */
  function drawNow(point, text) {
    if (!point?.bytes) return now.replaceChildren();
    const { top, bottom } = frame(), x = X(point.bytes), y = known(point) ? Y(point.accuracy) : bottom;
    const ring = { cx: x, cy: y, r: 7.5, fill: "#fff", stroke: INK.vermillion, "stroke-width": 3 };
    const nodes = [];
    if (!known(point)) nodes.push(s("path", { d: `M${x} ${top}V${bottom}`, stroke: INK.vermillion, "stroke-dasharray": "2 4", opacity: 0.6 }));
    if (known(point) && point.half) {
      const [a, b] = [Y(Math.min(1, point.accuracy + point.half)), Y(point.accuracy - point.half)];
      nodes.push(s("path", { d: `M${x} ${a}V${b}M${x - 5} ${a}h10M${x - 5} ${b}h10`, stroke: INK.vermillion, "stroke-width": 2 }));
    }
    nodes.push(s("circle", ring));
    if (known(point) && !point.half) nodes.push(s("circle", { cx: x, cy: y, r: 3, fill: INK.vermillion }));
    const taken = [...obstacles, boxAt(x, y, 9)];
    nodes.push(caption(`now ${text} · ${point.label ?? byteText(point.bytes)}`, x, y, taken, { fill: INK.vermillionText, "font-weight": "bold" }));
    now.replaceChildren(...nodes);
  }

  function update(state) {
    const { veil, dense, published, stored } = state;
    const walked = veil ? [] : state.walked, point = veil ? state.point && { ...state.point, accuracy: null } : state.point;
    if (!dense && !point) return;
    const accuracies = [dense, ...published, ...stored, ...walked, state.guess, point].filter(known).map((p) => p.accuracy);
    extend(state, accuracies);
    const key = JSON.stringify([width, height, reach, veil, walked.length, walked.at(-1), state.pins, state.guess, dense, published, stored]);
    if (key !== drawn) {
      drawn = key;
      obstacles = [];
      assign(svg, { viewBox: `0 0 ${width} ${height}` });
      drawGrid();
      drawPath(walked);
      drawMarks(state, veil);
    }
    const text = veil ? "?" : state.text || "…";
    drawNow(point, text);
    assign(svg, { "aria-label": `Accuracy against bytes on disk. Now ${text} at ${point?.label ?? "…"}. `
      + `${dense ? `Dense ${percent(dense.accuracy, 2)} at ${byteText(dense.bytes)}. ` : ""}${walked.length} points walked.` });
  }
  return { svg, update, forget: () => { reach = null; drawn = ""; },
    resize(w) { width = Math.round(w); height = Math.round(clamp(0.64 * w, 230, 300)); } };
}

// ------------------------------------------------------- what the net forgets

function classRow() {
  const label = h("span"), line = h("i"), was = h("b", { class: "pnl-was" }), is = h("b", { class: "pnl-is" }), text = h("span", { class: "pnl-number" });
  const node = h("li", {}, label, h("span", { class: "pnl-dumbbell" }, line, was, is), text);
  return { node, update({ label: name, dense, now }) {
    write(label, name);
    write(text, `${Math.round(100 * dense)} → ${Math.round(100 * now)} %`);
    was.style.left = `${100 * dense}%`;
    is.style.left = `${100 * now}%`;
    Object.assign(line.style, { left: `${100 * Math.min(dense, now)}%`, width: `${100 * Math.abs(dense - now)}%` });
  } };
}

const flipText = ({ truth, before, after }) => `${truth}: ${before}→${after}`;
/** Under a small picture, a long class name stands once. */
const flipCaption = ({ truth, before, after }) =>
  truth.length === 1 ? flipText({ truth, before, after }) : truth === before ? `${before} → ${after}` : `${truth}: ${before} → ${after}`;

function flipTile() {
  const pixels = makePixels(), text = h("figcaption");
  return { node: h("figure", {}, pixels.canvas, text), update({ flips, view, k }) {
    const label = flips.labels[k];
    pixels.draw(view, { w: flips.w, h: flips.h, palette: flips.palette ?? "grey" }, k);
    assign(pixels.canvas, { "aria-label": `truth ${label.truth}, before ${label.before}, now ${label.after}` });
    write(text, flipCaption(label));
  } };
}

function makeForgets() {
  const worst = h("ul", { class: "pnl-classes" }), tiles = h("div", { class: "pnl-flips" });
  const worstTitle = h("h3", {}, "what it forgets: accuracy by class, ", h("span", { class: "pnl-key-was" }, "dense"), " → ", h("span", { class: "pnl-key-is" }, "now"));
  const flipTitle = h("h3"), flipSide = h("div", {}, flipTitle, tiles), worstSide = h("div", {}, worstTitle, worst);
  const node = h("section", { class: "pnl-box pnl-forgets", "data-role": "forgets", "aria-label": "what it forgets" }, worstSide, flipSide);
  function update({ worst: rows, flips, flipBuffers, veil, exactSeq, pictureSeq }) {
    node.hidden = veil || !(rows.length || flips);
    node.classList.toggle("pnl-stale", exactSeq < pictureSeq);
    if (node.hidden) return;
    worstSide.hidden = !rows.length;
    fillList(worst, rows, classRow);
    flipSide.hidden = !flips?.n;
    if (!flips?.n) return;
    const view = flipBuffers[flips.buffer];
    write(flipTitle, flips.caption ?? `${(flips.total ?? flips.n).toLocaleString("en")} answers that flipped, truth: before→now`);
    tiles.style.setProperty("--n", flips.n);
    tiles.style.setProperty("--half", Math.ceil(flips.n / 2));
    fillList(tiles, Array.from({ length: flips.n }, (_, k) => ({ flips, view, k })), flipTile);
  }
  return { node, update };
}

// -------------------------------------------------------- figures and compare

const ofAccuracy = (label) => /accura/i.test(label);
const veilRow = (row) => (ofAccuracy(row[0]) ? [row[0], row[1], "?", ""] : row);
const shownCells = ({ cells, veil }) => (veil ? cells.map(veilRow) : cells);

/** New rows replace those of the same label, the others are added. */
function merge(old, fresh, key) {
  const rows = new Map(old.map((row) => [row[key], row]));
  for (const row of fresh ?? []) rows.set(row[key], row);
  return [...rows.values()];
}

function noteBox() {
  const title = h("strong"), text = h("span");
  const node = h("div", { class: "pnl-note" }, title, " ", text);
  return { node, update(note) {
    node.classList.toggle("pnl-warn", note.tone === "warn");
    write(title, note.title ?? "");
    write(text, note.text ?? "");
  } };
}

/** "1,066 kB" → {value: 1066000, unit: "B"}; null where there is no number. */
function quantity(text) {
  const found = /^([-−+]?[\d,]*\.?\d+)\s*([kMGµmn]?)([A-Za-z%×]*)/.exec(String(text).trim());
  if (!found) return null;
  const scale = { k: 1e3, M: 1e6, G: 1e9, m: 1e-3, "µ": 1e-6, n: 1e-9 }[found[2]] ?? 1;
  return { value: scale * Number(found[1].replace(/,/g, "").replace("−", "-")), unit: found[3] };
}
function difference(a, b) {
  const [p, q] = [quantity(a), quantity(b)];
  if (!p || !q || p.unit !== q.unit) return "";
  if (p.value === q.value) return "same";
  if (p.unit === "%") return `${q.value > p.value ? "+" : "−"}${Math.abs(q.value - p.value).toFixed(1)}`;
  return p.value ? `${(q.value / p.value).toPrecision(2).replace(/\.0$/, "")}×` : "";
}

/** A beside B, or A beside the present state while there is no B. */
function makeCompare(unpin) {
  const table = makeTable("pinned", ["", "A", "B", "change"], { "data-role": "compare" });
  const lines = h("ul");
  const node = h("section", { class: "pnl-box pnl-compare", "aria-label": "pinned states" }, table.node, lines, unpin);
  const cellsOf = (pin) => new Map((pin.cells ?? []).map((row) => [row[0], row.length > 2 ? row[2] : row[1]]));
  function update(state) {
    const { pins, veil } = state;
    node.hidden = !pins.length;
    if (node.hidden) return;
    const right = pins[1] ?? { label: "now", cells: state.cells };
    const [a, b] = [cellsOf(pins[0]), cellsOf(right)];
    table.head(["", pins[0].label, right.label, `${right.label} beside ${pins[0].label}`]);
    table.fill([...new Set([...a.keys(), ...b.keys()])].map((label) => veil && ofAccuracy(label) ? [label, "?", "?", ""]
      : [label, a.get(label) ?? "", b.get(label) ?? "", difference(a.get(label), b.get(label))]));
    fillList(lines, pins, () => {
      const code = h("code");
      return { node: h("li", {}, code), update: (pin) => write(code, `${pin.label}: ${pin.line ?? ""}`) };
    });
  }
  return { node, update };
}

// ------------------------------------------------------- predict, then reveal

function makePredict(onLock, onSkip) {
  const id = uid("guess");
  const question = h("label", { for: id, class: "pnl-question" }), answer = h("p", { class: "pnl-reveal", "data-role": "reveal" });
  const range = h("input", { type: "range", id, min: 0, max: 100, step: 1, value: 50, "data-role": "guess", oninput: () => follow(range) });
  const exact = h("input", { type: "number", class: "pnl-exact", min: 0, max: 100, step: "any", value: 50, "aria-label": "your guess in percent", "data-role": "guess-exact", onchange: () => follow(exact) });
  const value = () => clamp(exact.valueAsNumber || 0, 0, 100) / 100;
  const form = h("div", { class: "pnl-guess" }, question, h("div", { class: "pnl-guess-row" }, range, h("span", {}, exact, " %"),
    h("button", { type: "button", class: "pnl-primary", "data-role": "lock", onclick: () => onLock(value()) }, "lock in"),
    h("button", { type: "button", "data-role": "skip", onclick: onSkip }, "skip")));
  function follow(source) {
    (source === range ? exact : range).value = source.value;
    range.style.setProperty("--fill", `${100 * value()}%`);
    range.setAttribute("aria-valuetext", `${exact.value} percent`);
  }
  follow(range);
  const node = h("section", { class: "pnl-predict", "aria-label": "predict, then reveal", "data-role": "predict" }, form, answer);
  function update({ spec, veil, reveal }) {
    node.hidden = !veil && !reveal;
    form.hidden = !veil;
    answer.hidden = !reveal;
    write(question, spec.predict?.question ?? "");
    write(answer, reveal ?? "");
  }
  return { node, update };
}

// -------------------------------------------------------------- the text twin

function makeTwin() {
  const figures = makeTable("figures", ["", "dense", "now", "change"]);
  const layers = makeTable("layer by layer", ["layer", ""]);
  const classes = makeTable("worst classes, accuracy", ["class", "dense", "now"]);
  const walk = makeTable("the path walked", ["step", "bytes", "accuracy", "state"]), kept = makeTable("stored runs", ["run", "bytes", "accuracy", "state"]);
  const flips = h("p"), pictures = h("ul"), line = h("code");
  const node = h("details", { class: "pnl-twin", "data-role": "text-twin" },
    h("summary", {}, "the same as text (for reading aloud, printing, grading)"),
    h("div", { class: "pnl-twin-body" }, figures.node, layers.node, classes.node, kept.node, walk.node), flips, pictures, h("p", {}, "To have this state again: ", line));

  function nameCells(rows) {                     // tests and graders look these two up
    const exact = rows.findIndex(([label]) => ofAccuracy(label) && /exact/i.test(label));
    const accuracy = exact >= 0 ? exact : rows.findLastIndex(([label]) => ofAccuracy(label));
    const bytes = rows.findIndex(([label]) => /bytes|file|disk/i.test(label));
    [...figures.body.rows].forEach((tr, i) => assign(tr.cells[2], { "data-role": i === accuracy ? "twin-accuracy" : i === bytes ? "twin-bytes" : null }));
  }
  function update(state) {
    const { cards, veil, walked } = state, rows = [...shownCells(state)];
    const text = veil ? "?" : state.text || "…", seen = (label) => rows.some((row) => label.test(row[0]));
    if (!seen(/accura/i)) rows.unshift(["accuracy", state.dense ? percent(state.dense.accuracy, 2) : "", text, ""]);
    if (!seen(/bytes|file|disk/i)) rows.push(["file on disk", state.dense ? byteText(state.dense.bytes) : "", state.point?.label ?? "…", ""]);
    figures.fill(rows);
    nameCells(rows);
    const bars = cards.find((c) => c.kind === "bars");
    layers.head(["layer", (bars?.title ?? "").split(",")[0]]);
    layers.fill((bars?.rows ?? []).map((row) => [row.label, row.text ?? percent(row.share)]));
    classes.fill(veil ? [] : state.worst.map((row) => [row.label, percent(row.dense), percent(row.now)]));
    for (const [table, points] of [[walk, walked], [kept, state.stored]])
      table.fill(veil ? [] : points.map((p, i) => [i + 1, Math.round(p.bytes).toLocaleString("en"), percent(p.accuracy, 2), stateText(p)]));
    for (const table of [layers, classes, kept, walk]) table.node.hidden = !table.body.rows.length;
    write(flips, veil || !state.flips?.labels ? "" : `Answers that flipped${state.flips.total == null ? "" : `, ${state.flips.total} in all`}; some of them, truth: before→now: ${state.flips.labels.map(flipText).join("; ")}.`);
    fillList(pictures, cards.filter((c) => c.alt || c.caption), () => {
      const item = h("li");
      return { node: item, update: (card) => write(item, card.alt ?? `${card.caption} ${card.cut_label ?? ""}`) };
    });
    write(line, state.line ?? "");
  }
  return { node, update };
}
const stateText = ({ knobs, epochs, training }) => [...Object.entries(knobs ?? {}).map(([name, value]) => `${name} ${value}`),
  ...(epochs ? [`retrained, ${epochs} epoch${epochs > 1 ? "s" : ""}`] : training ? [`trained, ${training}`] : [])].join(", ");

// ------------------------------------------------------------------ take away

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(URL.revokeObjectURL, 10000, url);
}
function plotFile(svg, title) {
  const copy = svg.cloneNode(true), [, , w, high] = copy.getAttribute("viewBox").split(" ").map(Number);
  assign(copy, { xmlns: SVG, width: 2 * w, height: 2 * high });
  copy.prepend(s("title", {}, title), s("rect", { width: w, height: high, fill: "#fff" }));
  return new XMLSerializer().serializeToString(copy);
}
function pathFile(walked) {
  const names = [...new Set(walked.flatMap((p) => Object.keys(p.knobs ?? {})))];
  const quote = (x) => (/[",\n]/.test(String(x ?? "")) ? `"${String(x).replace(/"/g, '""')}"` : String(x ?? ""));
  const rows = walked.map((p, i) => [i + 1, p.bytes, p.accuracy, ...names.map((name) => p.knobs?.[name]), p.epochs]);
  return [["step", "bytes", "accuracy", ...names, "epochs"], ...rows].map((row) => row.map(quote).join(",")).join("\n") + "\n";
}

function makeTakeAway(state, svg, say) {
  const spare = h("textarea", { class: "pnl-spare", rows: 2, readonly: true, hidden: true, "aria-label": "the line that reproduces this state, to copy" });
  async function copy() {
    try {
      await navigator.clipboard.writeText(state.line ?? "");
      say("line copied");
    } catch {                                    // no permission, or http: leave it selected for Ctrl-C
      spare.hidden = false;
      spare.value = state.line ?? "";
      spare.focus();
      spare.select();
      say("press Ctrl-C to copy the line");
    }
  }
  const name = () => (state.spec.title ?? "panel").toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const item = (text, role, onclick) => h("button", { type: "button", "data-role": role, onclick: () => { menu.open = false; onclick(); } }, text);
  const menu = h("details", { class: "pnl-menu", "data-role": "take-away" }, h("summary", {}, "take away"), h("div", {},
    item("path plot as SVG", "save-svg", () => download(`${name()}.svg`, "image/svg+xml", plotFile(svg, state.spec.title))),
    item("path as CSV", "save-csv", () => download(`${name()}.csv`, "text/csv", pathFile(state.veil ? [] : state.walked))),
    item("copy the line", "copy-line", copy)));
  menu.addEventListener("keydown", (e) => { if (e.key === "Escape") { menu.open = false; menu.firstChild.focus(); } });
  menu.addEventListener("focusout", (e) => { if (e.relatedTarget && !menu.contains(e.relatedTarget)) menu.open = false; });
  return { menu, spare };
}

// ------------------------------------------------------------------ the panel

const freshState = () => ({ spec: {}, values: {}, layer: null, pictureSeq: -1, estimateSeq: -1, exactSeq: -1, cards: [], buffers: [], cells: [],
  notes: [], lateNotes: null, point: null, text: "", walked: [], published: [], stored: [], dense: null, worst: [], flips: null, flipBuffers: [],
  pins: [], guess: null, reveal: "", veil: false, train: null, line: "", error: "", asked: new Set() });

function makePanel(model, el) {
  const state = freshState();
  const send = (message) => { try { model.send(message); } catch { busy.hidden = false; write(busy, "no kernel"); } };
  const asker = makeAsker(send, (late) => { busy.hidden = !late; write(busy, "kernel busy…"); });
  const dirty = new Set();
  let frame = 0, knobs = new Map(), layer = null;

  // ---- the skeleton, made once
  const button = (text, role, onclick, more = {}) => h("button", { type: "button", "data-role": role, onclick, ...more }, text);
  const busy = h("span", { class: "pnl-busy", hidden: true, "data-role": "busy" }), said = h("p", { class: "pnl-hidden", role: "status", "aria-live": "polite", "data-role": "status" });
  const header = h("header"), knobRow = h("div", { class: "pnl-knobs" });
  const pin = button("pin", "pin", () => send({ type: "pin" }));
  const epochs = h("select", { "aria-label": "epochs of retraining", "data-role": "epochs" });
  const train = button("retrain", "train", () => send({ type: "train", epochs: Number(epochs.value) })), reset = button("reset", "reset", goBack);
  const controls = h("section", { class: "pnl-box pnl-controls", "aria-label": "controls" }, knobRow, h("div", { class: "pnl-buttons" }, pin, h("span", { class: "pnl-train" }, train, epochs), reset));
  const progress = h("progress", { "aria-label": "training", max: 1 }), trainText = h("span");
  const stop = button("stop", "stop", () => send({ type: "stop" })), training = h("div", { class: "pnl-training", hidden: true, "data-role": "training" }, progress, trainText, stop);
  const error = h("div", { class: "pnl-error", role: "alert", "data-role": "error", hidden: true });
  const predict = makePredict(lockIn, () => { state.veil = false; mark("all"); });
  const plot = makePlot(), takeAway = makeTakeAway(state, plot.svg, say);
  const pictures = h("div", { class: "pnl-pictures" });
  const bars = h("div", { class: "pnl-second" }), tools = h("div", { class: "pnl-tools" }, button("clear path", "clear", forgetPath), takeAway.menu);
  const plotBox = h("figure", { class: "pnl-plot" }, h("h3", {}, "accuracy against bytes on disk: the path you walked"), plot.svg,
    takeAway.spare);
  const figures = makeTable("figures, dense beside now", ["", "dense", "now", "change"], { class: "pnl-figures", "data-role": "table" });
  const notes = h("div", { class: "pnl-notes", "data-role": "notes" });
  const forgets = makeForgets(), compare = makeCompare(button("unpin", "unpin", () => send({ type: "unpin" }))), twin = makeTwin();
  const drawCards = makeCards(pictures, bars);
  // JupyterLab would take arrows and letters for notebook commands: controls keep their keys, the page those with a modifier
  const keep = (e) => { if (!e.ctrlKey && !e.metaKey && !e.altKey && !e.shiftKey && !["Tab", "Escape"].includes(e.key)) e.stopPropagation(); };
  const root = h("article", { class: "pnl", "data-role": "panel", "data-lm-suppress-shortcuts": true, onkeydown: keep }, header, controls, training, error, predict.node,
    h("div", { class: "pnl-main" },
      h("section", { class: "pnl-box pnl-stage", "aria-label": "pictures" }, h("div", { class: "pnl-left" }, pictures), h("div", { class: "pnl-right" }, plotBox, bars)),
      h("section", { class: "pnl-lower", "aria-label": "figures" }, figures.node, notes)),
    forgets.node, compare.node, twin.node, said);
  el.replaceChildren(h("div", { class: "pnl-room" }, root));

  // ---- painting: one frame for whatever is dirty
  const painters = {
    cards: () => drawCards(state.cards, state.buffers),
    plot: () => plot.update(state),
    figures() {
      figures.fill(shownCells(state));
      fillList(notes, state.veil ? state.notes : state.lateNotes ?? state.notes, noteBox);
    },
    forgets: () => forgets.update(state),
    compare: () => compare.update(state),
    predict: () => predict.update(state),
    train: paintTrain,
    twin: () => twin.update(state),
  };
  function mark(...names) {
    for (const name of names[0] === "all" ? Object.keys(painters) : names) dirty.add(name);
    frame ||= requestAnimationFrame(paint);
  }
  function paint() {
    frame = 0;
    for (const name of Object.keys(painters)) if (dirty.delete(name)) attempt(painters[name]);
    error.hidden = !state.error;
    write(error, state.error);
    assign(root, { "data-seq": state.pictureSeq, "data-estimate": state.estimateSeq, "data-exact": state.exactSeq });
  }
  function attempt(work) {                       // a bad picture must not take the sliders with it
    try { work(); } catch (problem) { state.error = `This picture could not be drawn: ${problem.message}`; console.error(problem); }
  }
  function paintTrain() {
    const { state: stage, epoch, epochs, text } = state.train ?? {};
    training.hidden = !stage;
    stop.hidden = progress.hidden = stage !== "running";
    training.classList.toggle("pnl-failed", stage === "failed");
    if (epochs) progress.value = (epoch ?? 0) / epochs; else progress.removeAttribute("value");
    write(trainText, text ?? `${stage ?? ""}${epochs ? ` · epoch ${epoch} of ${epochs}` : ""}`);
    train.disabled = stage === "running";
  }
  function say(text) { write(said, text); }

  // ---- asking
  const read = () => Object.fromEntries([...knobs].map(([name, knob]) => [name, knob.get()]));
  const body = () => ({ type: "move", knobs: (state.values = read()), layer: (state.layer = layer?.get() ?? null) });
  function ask() {
    const move = body();
    asker.ask(move);
    root.dataset.asked = asker.newest;
    state.asked.add(move.seq);
    for (const seq of state.asked) if (seq < move.seq - 200) state.asked.delete(seq);
  }
  function turn(values) { for (const [name, value] of Object.entries(values)) knobs.get(name)?.set(value); }
  function goBack() {
    turn(Object.fromEntries((state.spec.knobs ?? []).map((knob) => [knob.name, knob.value])));
    ask();
  }
  function forgetPath() {
    state.walked = [];
    plot.forget();
    send({ type: "clear" });
    mark("plot", "twin");
  }
  /** The sliders go where the question was asked, so that the answer is seen there. */
  function lockIn(value) {
    turn(state.spec.predict.at ?? {});
    ask();
    send({ type: "guess", seq: asker.newest, value, knobs: read() });
    Object.assign(state, { veil: false, guess: { accuracy: value, seq: asker.newest }, reveal: `Your guess: ${percent(value, 0)}. Measuring…` });
    mark("all");
  }

  // ---- controls, remade when the spec changes
  function sameKnob(a, b) { return JSON.stringify(a) === JSON.stringify(b); }
  function follow(spec) {
    const old = state.spec, values = state.values;
    Object.assign(state, { spec, dense: spec.dense ?? null, published: spec.published ?? [], stored: spec.stored ?? [], line: spec.line ?? state.line });
    if (!sameKnob(old.predict, spec.predict)) Object.assign(state, { veil: Boolean(spec.predict), reveal: "", guess: null });
    if (!sameKnob(old.walked, spec.walked)) { state.walked = [...(spec.walked ?? [])].filter(known); plot.forget(); }
    if (!sameKnob(old.dense, spec.dense)) plot.forget();
    makeHeader(spec);
    makeKnobs(spec, old, values);
    train.hidden = epochs.hidden = !spec.train;
    if (!sameKnob(old.train, spec.train)) epochs.replaceChildren(...(spec.train?.epochs ?? []).map((n) => h("option", { value: n }, `${n} epoch${n > 1 ? "s" : ""}`)));
    write(train, `${spec.train?.label ?? "retrain"} ▸`);
    assign(train, { title: spec.train?.title });
    mark("all");
  }
  function makeHeader(spec) {
    const aside = [spec.paper, spec.chapter && `chapter ${spec.chapter}`].filter(Boolean).map((word) => ` · ${word}`).join("");
    const seed = spec.seed && makeSeed(spec.seed, (value) => send({ type: "seed", value }));
    header.replaceChildren(h("h2", {}, spec.title ?? "", h("span", {}, aside)), busy, tools, h("p", {}, spec.subtitle ?? "", ...(seed ? [" · ", seed] : [])));
    assign(root, { "aria-label": spec.title });
  }
  function makeKnobs(spec, old, values) {
    const before = new Map((old.knobs ?? []).map((knob) => [knob.name, knob]));
    const focused = root.contains(document.activeElement) ? document.activeElement.dataset.role : null;
    const firstSpan = (spec.knobs ?? []).find((knob) => knob.kind === "span");
    knobs = new Map((spec.knobs ?? []).map((knob) => [knob.name, knob.kind === "span" ? makeSpan(knob, knob === firstSpan, ask) : makePick(knob, ask)]));
    layer = spec.layer && makePick({ label: "pictured layer", ...spec.layer }, ask, "layer");
    // a knob that did not change keeps the hand's position
    turn(Object.fromEntries(Object.entries(values).filter(([name]) => before.has(name) && sameKnob(before.get(name), spec.knobs.find((k) => k.name === name)))));
    if (layer && old.layer && sameKnob(old.layer, spec.layer)) layer.set(state.layer);
    const inOrder = [...knobs.values(), layer].filter(Boolean).map((knob) => knob.node), isSpan = (node) => node.classList.contains("pnl-span");
    knobRow.replaceChildren(...inOrder.filter(isSpan), ...inOrder.filter((node) => !isSpan(node)));
    if (focused) root.querySelector(`[data-role="${CSS.escape(focused)}"]`)?.focus();
    state.values = read();
  }

  // ---- hearing
  const same = (a, b) => a?.bytes === b.bytes && a.accuracy === b.accuracy && stateText(a) === stateText(b);
  const stepOn = (point) => {                    // a new exact point joins the path
    if (known(point) && !same(state.walked.at(-1), point)) state.walked.push(point);
  };
  const hear = {
    picture(message, buffers) {
      const { seq = 0 } = message;
      asker.answered(seq);
      if (seq < state.pictureSeq) return;
      if (message.knobs && !state.asked.has(seq)) {                          // another view's move, or the state before a reload
        turn(message.knobs);
        state.values = read();
        if (message.layer) layer?.set(message.layer);
      }
      Object.assign(state, { pictureSeq: seq, cards: message.cards ?? [], buffers, cells: message.cells ?? state.cells, notes: message.notes ?? [], lateNotes: null,
        point: message.point ? { ...message.point } : state.point, line: message.line ?? state.line, text: "", error: "" });
      if (state.guess && !state.guess.bytes && seq >= state.guess.seq) state.guess.bytes = message.point?.bytes;
      mark("cards", "plot", "figures", "forgets", "twin", ...(state.pins.length ? ["compare"] : []));
    },
    estimate(message) {
      state.estimateSeq = message.seq;
      measured(message, { half: message.half ?? 0 });
      mark("plot", "figures", "twin", ...(state.pins.length ? ["compare"] : []));
    },
    exact(message, buffers) {
      state.exactSeq = message.seq;
      measured(message, { half: 0 });
      stepOn(state.point);
      Object.assign(state, { worst: message.worst ?? [], flips: message.flips ?? null, flipBuffers: buffers });
      state.lateNotes = message.notes ?? state.lateNotes;
      if (!state.veil) say(`Accuracy ${state.text}, file ${state.point?.label ?? ""}, at ${stateText(state.point)}.`);
      mark("plot", "figures", "forgets", "twin", ...(state.pins.length ? ["compare"] : []));
    },
    rest(message) {
      state.cells = merge(state.cells, message.cells, 0);
      state.lateNotes = message.notes ?? state.lateNotes;
      mark("figures", "twin", ...(state.pins.length ? ["compare"] : []));
    },
    pinned({ pins }) { state.pins = pins ?? []; mark("compare", "plot", "twin"); },
    train(message) {
      state.train = message;
      stepOn(message.point);
      mark("train", "plot", "twin");
    },
    guess({ value, actual, text }) {
      state.guess = { seq: 0, ...state.guess, accuracy: value, bytes: state.guess?.bytes ?? state.point?.bytes };
      state.reveal = text ?? `Your guess: ${percent(value, 0)}; measured: ${percent(actual, 1)}.`;
      state.veil = false;
      mark("all");
    },
    error({ seq, message }) {
      asker.answered(seq ?? asker.newest);
      state.error = message;
      mark();
    },
  };
  function measured(message, { half }) {
    state.cells = merge(state.cells, message.cells, 0);
    state.text = message.text ?? percent(message.accuracy, half ? 1 : 2);
    state.point = { ...state.point, ...message.point, accuracy: message.point?.accuracy ?? message.accuracy, half };
  }
  const ANY_TIME = new Set(["picture", "pinned", "train", "guess", "error"]);
  function onMessage(message, buffers) {
    if (!hear[message?.type]) return;
    if (!ANY_TIME.has(message.type) && (message.seq ?? 0) < state.pictureSeq) return;      // about a state already left
    hear[message.type](message, buffers ?? []);
  }
  const onSpec = () => { follow(model.get("spec") ?? {}); ask(); };

  // ---- life
  const sizes = new ResizeObserver(() => {
    const em = parseFloat(getComputedStyle(plotBox).fontSize) || 13;
    const width = (13 * plotBox.clientWidth) / em;
    if (width < 40) return;
    plot.resize(width);
    mark("plot");
  });
  const paper = window.matchMedia("print");
  let wasOpen = false;
  const onPaper = () => {                        // the twin is printed open
    if (paper.matches) { wasOpen = twin.node.open; twin.node.open = true; } else twin.node.open = wasOpen;
  };
  follow(model.get("spec") ?? {});
  sizes.observe(plotBox);
  paper.addEventListener("change", onPaper);
  model.on("msg:custom", onMessage);
  model.on("change:spec", onSpec);
  asker.ready(body());

  return () => {
    model.off("msg:custom", onMessage);
    model.off("change:spec", onSpec);
    paper.removeEventListener("change", onPaper);
    sizes.disconnect();
    asker.stop();
    cancelAnimationFrame(frame);
  };
}

export default { render: ({ model, el }) => makePanel(model, el) };
