
// Size against KL divergence: every file that was evaluated, and the line of those that none beats in both.

const shownFile = data.files[0];
const kldWords = ([value, error]) => `${digits(value)} ± ${digits(error)}`;

function frontier() {
  const { columns, top_k, files } = data.frontier;
  $("frontier-lead").textContent = `KL divergence from the original, in nats, on a log scale, against the size without ` +
    `MTP blocks. The line joins the files that no other beats in both.` +
    (top_k ? ` Over the ${top_k} likeliest tokens and one bin for the rest: a lower bound.` : "");
  view.column = "0";
  $("frontier-controls").append(choice("Show", "column", Object.fromEntries(columns.entries()), frontierPlot));
  frontierPlot();
  table("frontier-table", [["File", "left"], ["Size"], ["bpw"], ...columns.map((name) => [name])],
    files.map(({ file, bytes: size, bpw, kld }) => [file, bytes(size), bpw.toFixed(3), ...kld.map(kldWords)]));
}

function frontierPlot() {
  const points = data.frontier.files.map((file) => ({ ...file, value: file.kld[view.column][0] }));
  const drawn = points.filter(({ value }) => value > 0); // an identical file has no place on a log scale
  const [x, y] = [place(drawn.map((point) => point.bytes), 0.15), place(drawn.map((point) => Math.log(point.value)), 0.15)];
  const at = (point) => [100 * x(point.bytes), 100 * (1 - y(Math.log(point.value)))];
  const best = drawn.filter((point, i) => drawn.slice(0, i).every((smaller) => smaller.value > point.value));
  const line = draw("path", { d: best.map((point, i) => `${i ? "L" : "M"}${at(point).join(" ")}`).join("") });
  const dots = drawn.map((point) => {
    const [left, top] = at(point), words = `${point.file}: ${bytes(point.bytes)}, ${kldWords(point.kld[view.column])}`;
    const className = `dot${point.file === shownFile ? " this" : ""}${left > 50 ? " before" : ""}`;
    return set(make("span", { className, title: words }, `${point.file} · ${digits(point.value)}`), { x: `${left}%`, y: `${top}%` });
  });
  const svg = draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" }, line);
  const plot = make("div", { className: "cells plot", role: "img" }, svg, ...dots);
  plot.ariaLabel = "Size against KL divergence; the table below has the figures.";
  $("frontier-plot").replaceChildren(set(plot, { height: "19rem" }));
}

/** A value's place between the least and the most, with a margin at both ends. */
function place(values, margin) {
  const low = Math.min(...values), span = Math.max(...values) - low;
  return (value) => (span ? margin + (1 - 2 * margin) * (value - low) / span : 0.5);
}
