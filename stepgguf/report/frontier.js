
// Size against KL divergence: every file that was evaluated, and the line of those that none beats in both.

const shownFile = data.files[0];
const kldWords = ([value, error]) => `${digits(value)} ± ${digits(error)}`;
const short = (x) => `${Number(x.toPrecision(3))}`;
const GAP = 9; // pixels between a mark and its name

function frontier() {
  const { columns, top_k, engine, files } = data.frontier;
  $("frontier-lead").textContent = `KL divergence from the original, in nats, on a log scale, against the size without ` +
    `MTP blocks. The line joins the files that no other beats in both.` +
    (engine === "stream" ? " Of the weights alone: activations are exact." : "") +
    (top_k ? ` Over the ${top_k} likeliest tokens and one bin for the rest: a lower bound.` : "");
  view.column = "0";
  $("frontier-controls").append(choice("Show", "column", Object.fromEntries(columns.entries()), frontierPlot));
  frontierPlot();
  table("frontier-table", [["File", "left"], ["", "left"], ["Size"], ["bpw"], ...columns.map((name) => [name])],
    files.map(({ file, is_stock, bytes: size, bpw, kld }) =>
      [file, is_stock ? "stock" : "", bytes(size), bpw.toFixed(3), ...kld.map(kldWords)]));
}

function frontierPlot() {
  const { files, off } = data.frontier, other = off !== null && `${off}` !== view.column ? off : null;
  const names = shortNames(files.map(({ file }) => file));
  const points = files.map((file, i) => (
    { ...file, name: names[i], value: file.kld[view.column][0], away: other === null ? 0 : file.kld[other][0] }));
  const drawn = points.filter(({ value }) => value > 0); // an identical file has no place on a log scale
  if (!drawn.length) {
    $("frontier-plot").replaceChildren(make("p", { className: "note" }, "Nothing to draw: no file differs from the original here."));
    return;
  }
  const [x, y] = scales(drawn);
  const best = drawn.filter((point, i) => drawn.slice(0, i).every((smaller) => smaller.value > point.value));
  const line = draw("path", { d: best.map((p, i) => `${i ? "L" : "M"}${x.at(p.bytes)} ${y.at(p.value)}`).join("") });
  const level = (at) => draw("line", { x1: 0, x2: 100, y1: at, y2: at });
  const upright = (at, fields) => draw("line", { x1: at, x2: at, y1: 0, y2: 100, ...fields });
  const far = drawn.filter(({ away }) => away > 0);
  const drops = far.map((p) => upright(x.at(p.bytes), { class: "drop", y1: y.at(p.value), y2: y.at(p.away) }));
  const marks = [...far.map((p) => mark(p, x.at(p.bytes), y.at(p.away), "away")),
    ...drawn.map((p) => mark(p, x.at(p.bytes), y.at(p.value), p.file === shownFile ? "this" : ""))];
  const labels = drawn.map((p) => ({ p, rank: p.file === shownFile ? 0 : best.includes(p) ? 1 : 2 }))
    .sort((a, b) => a.rank - b.rank)
    .map(({ p, rank }) => set(make("span", { className: rank ? "label" : "label this" }, p.name),
      { x: `${x.at(p.bytes)}%`, y: `${y.at(p.value)}%` }));
  const grid = [...y.steps.map((step) => level(y.at(step))), ...x.steps.map((step) => upright(x.at(step), {}))];
  const svg = draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
    ...grid, ...drops, line);
  const plot = make("div", { className: "cells plot", role: "img" }, svg, ...marks, ...labels);
  plot.ariaLabel = "Size against KL divergence; the table below has the figures.";
  const yTicks = y.steps.map((step) => placed(short(step), y.at(step) / 100));
  const xTicks = x.steps.map((step) => placed(bytes(step).replace(/\.?0+ /, " "), x.at(step) / 100));
  $("frontier-plot").replaceChildren(make("div", { className: "map" },
    make("div", { className: "names", ariaHidden: "true" }, ...y.steps.map((step) => widest(short(step))), ...yTicks),
    set(plot, { height: "22rem" }),
    make("div", { className: "ticks", ariaHidden: "true" }, ...xTicks), make("div", { className: "axis" }, "size"),
  ), legend(other));
  new ResizeObserver(() => placeLabels(plot)).observe(plot);
}

/** A file's mark. `kind`: away for random tokens beside another column, this for the page's file. */
function mark(point, left, top, kind) {
  const value = point.kld[kind === "away" ? data.frontier.off : view.column];
  const words = `${point.file}: ${bytes(point.bytes)}, ${kind === "away" ? "random tokens " : ""}${kldWords(value)}`;
  return set(make("span", { className: `dot ${point.is_stock ? "stock" : "ours"} ${kind}`, title: words }),
    { x: `${left}%`, y: `${top}%` });
}

function legend(other) {
  const { files } = data.frontier, entry = (kind, words) => make("li", {}, make("i", { className: `dot ${kind}` }), words);
  return make("ul", { className: "legend", id: "frontier-legend" },
    ...(files.some((file) => !file.is_stock) ? [entry("ours", "types or codes chosen by measurement")] : []),
    ...(files.some((file) => file.is_stock) ? [entry("stock", "a mixture of llama.cpp's")] : []),
    ...(files.some(({ file }) => file === shownFile) ? [entry("ours this", "this file")] : []),
    ...(other === null ? [] : [entry("ours away", "the same on random tokens")]));
}

/** Places in percent and the numbers to write, of sizes and of divergences. */
function scales(points) {
  const sizes = points.map((p) => p.bytes), klds = points.flatMap((p) => [p.value, p.away].filter((v) => v > 0));
  const [small, large] = [Math.min(...sizes), Math.max(...sizes)], room = (large - small) * 0.12 || large * 0.1;
  const [left, right] = [small - room, large + room];
  const [least, most] = [Math.min(...klds), Math.max(...klds)], factor = Math.max(1.3, (most / least) ** 0.1);
  const [low, high] = [least / factor, most * factor];
  return [
    { at: (v) => 100 * (v - left) / (right - left), steps: linearSteps(left, right, narrow.matches ? 3 : 6) },
    { at: (v) => 100 * (1 - Math.log(v / low) / Math.log(high / low)), steps: logSteps(low, high) },
  ];
}

/** Files' names without their ending, and without what all begin with. */
function shortNames(files) {
  const names = files.map((file) => file.replace(/\.gguf$/, "")), [first] = names;
  const same = upTo(first.length + 1).findLast((n) => names.every((name) => name.startsWith(first.slice(0, n))));
  const cut = names.length > 1 ? Math.max(...["-", "_", "."].map((mark) => first.lastIndexOf(mark, same - 1))) + 1 : 0;
  return names.map((name) => name.slice(cut));
}

/** Put each name beside its mark where it covers nothing. What finds no place is hidden, but for this file's name: the
 * table has them all. */
function placeLabels(plot) {
  const box = plot.getBoundingClientRect();
  const taken = [...plot.querySelectorAll(".dot")].map((dot) => dot.getBoundingClientRect());
  for (const label of plot.querySelectorAll(".label")) {
    const { width: w, height: h } = label.getBoundingClientRect();
    const at = [...plot.querySelectorAll(".dot")].find((dot) => samePlace(dot, label)).getBoundingClientRect();
    const [x, y] = [at.left + at.width / 2, at.top + at.height / 2];
    const near = GAP / 2; // the line falls to the right: above it and below it first
    const around = [[near, -near - h], [-near - w, near], [GAP, -h / 2], [-GAP - w, -h / 2], [-w / 2, -GAP - h],
      [-w / 2, GAP], [near, near], [-near - w, -near - h]];
    const inside = around.map(([dx, dy]) => new DOMRect(x + dx, y + dy, w, h)).filter((place) =>
      place.left >= box.left && place.right <= box.right && place.top >= box.top && place.bottom <= box.bottom);
    const free = inside.find((place) => !taken.some((other) => overlap(place, other))) ??
      (label.classList.contains("this") ? inside[0] : undefined);
    label.classList.toggle("hidden", !free);
    if (!free) continue;
    taken.push(free);
    set(label, { dx: `${free.left - x}px`, dy: `${free.top - y}px` });
  }
}
const samePlace = (a, b) => ["--x", "--y"].every((name) => a.style.getPropertyValue(name) === b.style.getPropertyValue(name));
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
