
"use strict";
// What page.js draws with: elements, numbers in words, colours, tables and maps. It knows nothing of models.

const $ = (id) => document.getElementById(id);

const make = (tag, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};
const draw = (tag, attributes, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const set = (element, properties) => {
  for (const [name, value] of Object.entries(properties)) element.style.setProperty(`--${name}`, value);
  return element;
};

/** A sentence; what stands in backquotes is code. */
const prose = (text) => text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));

// ---- numbers in words ----------------------------------------------------------------------------------------------

const NONE = "–";
const grouped = (n) => (n === null ? NONE : n.toLocaleString("en"));
const scaled = (n, units) => {
  const [unit, scale] = units.find(([, scale]) => n >= scale) ?? ["B", 1];
  return `${scale === 1 ? n : (n / scale).toFixed(2)} ${unit}`;
};
const bytes = (n) => scaled(n, [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]);
const binary = (n) => scaled(n, [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]);
const share = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)} %` : NONE);
const percent = (x) => (x === null ? NONE : `${digits(100 * x)} %`);
const times = (x) => (x === null ? NONE : `${digits(x)} ×`);
const counted = (n, word) => `${grouped(n)} ${word}${n === 1 ? "" : "s"}`;

function digits(x) { // three that count
  const power = x === 0 ? 0 : Math.floor(Math.log10(Number(x.toPrecision(3))));
  return power < -4 ? x.toExponential(2) : x.toFixed(Math.max(0, 2 - power));
}

function ranges(numbers) { // [3, 4, 5, 7] -> "3–5, 7"
  const runs = [];
  for (const n of numbers) {
    if (runs.length && n === runs.at(-1)[1] + 1) runs.at(-1)[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}

// ---- colours -------------------------------------------------------------------------------------------------------

// viridis at 0, 0.1, ... 1 (matplotlib's, CC0): even steps for the eye, and in order for every kind of colour vision.
const VIRIDIS = `440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725`.split(" ")
  .map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
function viridis(t) {
  const place = t * (VIRIDIS.length - 1), i = Math.min(VIRIDIS.length - 2, Math.floor(place));
  return `rgb(${VIRIDIS[i].map((a, k) => Math.round(a + (place - i) * (VIRIDIS[i + 1][k] - a))).join(" ")})`;
}
const swatch = (colour) => set(make("span", { className: "swatch" }), { key: colour });

// ---- scales --------------------------------------------------------------------------------------------------------

/** Numbers to write at a logarithmic scale from low to high. */
function logSteps(low, high) {
  const most = Math.ceil(Math.log10(high)), fine = high / low < 8 ? [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] : [1, 2, 5];
  return upTo(10).flatMap((power) => fine.map((k) => k * 10 ** (most - power))).filter((x) => x > low && x < high);
}

/** Numbers to write at a linear scale: about n of them. */
function linearSteps(low, high, n) {
  const rough = (high - low) / n, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((k) => k * power >= rough), first = Math.ceil(low / step);
  return upTo(Math.floor(high / step) - first + 1).map((i) => (first + i) * step);
}

// ---- tables --------------------------------------------------------------------------------------------------------

// Columns are [title, class]. The first cell of a row is its name; `foot` is one more row.
function table(id, columns, rows, foot) {
  const line = (row) => make("tr", {}, ...row.map((cell, i) => {
    const element = make(i ? "td" : "th", { className: columns[i][1] ?? "" }, cell);
    if (!i) element.scope = "row";
    return element;
  }));
  const titles = columns.map(([title, kind]) => make("th", { className: kind ?? "", scope: "col" }, title));
  $(id).append(make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows.map(line)));
  if (foot) $(id).append(make("tfoot", {}, line(foot)));
}

// ---- maps: cells in rows and columns, read by pointer, finger or keys ----------------------------------------------

// rows and columns are the cells' names, "" where none is written; describe(row, column) is a cell in words.
function map(id, { rows, columns, axis, height, label, hint, kind, describe, content }) {
  const n = rows.length, m = columns.length, plot = kind === "plot";
  const mark = make("div", { className: "mark", hidden: true }), readout = make("p", { className: "readout" }, hint);
  readout.role = "status";
  const fields = { className: `cells ${kind}`, tabIndex: 0, role: "application", ariaLabel: label };
  const cells = set(make("div", fields, content, mark), { height, rows: n, columns: m });
  let at = null;
  const within = (i, count) => Math.max(0, Math.min(count - 1, i));
  const show = (row, column) => {
    at = [within(row, n), within(column, m)];
    const x = (at[1] + (plot ? 0.5 : 0)) / m;
    set(mark, { x: `${100 * x}%`, y: `${100 * at[0] / n}%`, w: `${100 / m}%`, h: `${100 / n}%` });
    tell(describe(...at), true);
  };
  const tell = (text, isCell) => {
    mark.hidden = !isCell;
    readout.classList.toggle("live", isCell);
    readout.textContent = text;
  };
  cells.onpointermove = cells.onpointerdown = (event) => {
    const box = cells.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    show(Math.floor(y * n), Math.floor(x * m));
  };
  cells.onpointerleave = (event) => { // a click or a key holds the cell
    if (event.pointerType === "mouse" && document.activeElement !== cells) tell(hint, false);
  };
  cells.onblur = () => tell(hint, false);
  cells.onkeydown = (event) => {
    const [row, column] = at ?? [0, -1];
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], PageUp: [0, column], PageDown: [n - 1, column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], Home: [row, 0], End: [row, m - 1],
    }[event.key];
    if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(...to);
  };
  const along = (names) => names.flatMap((name, i) => (name === "" ? [] : [placed(name, (i + 0.5) / names.length)]));
  $(id).replaceChildren(make("div", { className: "map" },
    make("div", { className: "names", ariaHidden: "true" }, ...rows.map(widest), ...along(rows)), cells,
    make("div", { className: "ticks", ariaHidden: "true" }, ...along(columns)),
    make("div", { className: "axis" }, axis),
  ), readout);
}
const placed = (text, part) => set(make("span", {}, text), { at: `${100 * part}%` });
const widest = (name) => make("b", {}, name); // unseen: the column is as wide as its widest name
// One name in `step`; all, where they are few.
const every = (names, step) => names.map((name, i) => (names.length > 12 && i % step ? "" : `${name}`));

// A canvas with one pixel a cell, which the style sheet enlarges. colour(row, column) is null where there is nothing.
function pixels(n, m, colour) {
  const canvas = make("canvas", { width: m, height: n }), context = canvas.getContext("2d");
  for (let row = 0; row < n; row++) {
    for (let column = 0; column < m; column++) {
      const fill = colour(row, column);
      if (fill === null) continue;
      context.fillStyle = fill;
      context.fillRect(column, row, 1, 1);
    }
  }
  return canvas;
}

