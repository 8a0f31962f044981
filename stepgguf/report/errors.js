
// What was measured: every expert, the layers, who stands out, what calibration saw.

// ---- every expert --------------------------------------------------------------------------------------------------

const USE = data.experts?.count ? "Use" : "Signal"; // figures.py: what is known of an expert's use
const MEASURES = {
  relative: ["Error over its type's level", times], error: ["Error", percent], rmse: ["RMSE", digits], use: [USE, times],
};
const view = { projection: "down", measure: "relative", scale: "log", order: "number", layers: "relative" };
const UNSEEN = "#d55e00"; // vermillion: not in viridis

function choice(title, name, options, redraw = expertMap) {
  const radio = ([value, text]) => make("label", {}, make("input", {
    type: "radio", name, value, checked: view[name] === value, onchange: () => { view[name] = value; redraw(); },
  }), text);
  return make("fieldset", { id: `choose-${name}` }, make("legend", {}, title), ...Object.entries(options).map(radio));
}

function controls() {
  const { use } = data.experts;
  $("controls").append(
    choice("Show", "measure", { relative: "Error ÷ level", error: "Error", rmse: "RMSE", ...(use && { use: USE }) }),
    choice("Projection", "projection", { gate: "gate", up: "up", down: "down" }),
    choice("Scale", "scale", { log: "log", linear: "linear" }),
    ...(use ? [choice("Experts by", "order", { number: "number", use: USE.toLowerCase() })] : []));
}

/** The error over the level of the type, or null. */
const overLevel = (error, type) => (error === null || !data.levels[type] ? null : error / data.levels[type]);

/** What is shown: [layers][experts]. */
function gridOf({ measure, projection }) {
  const { error, types, use } = data.experts;
  if (measure === "use") return use;
  if (measure !== "relative") return data.experts[measure][projection];
  return error[projection].map((row, i) => row.map((x) => overLevel(x, types[projection][i])));
}

function expertWords(i, e) {
  const { layers, types, error, rmse, use, count } = data.experts, { projection } = view;
  const words = [`Layer ${layers[i]}, expert ${e}`, `${projection} ${types[projection][i]}`];
  const found = error[projection][i][e], type = types[projection][i];
  words.push(`error ${percent(found)}, ${times(overLevel(found, type))} ${type}'s level`);
  if (rmse[projection][i][e] !== null) words.push(`RMSE ${digits(rmse[projection][i][e])}`);
  if (use) words.push(`${USE.toLowerCase()} ${times(use[i][e])}${count ? `, ${grouped(count[i][e])} tokens` : ""}`);
  return words.join(" · ");
}

// A value's place on the scale, from 0 to 1, and the value at a place. On a log scale a zero is at the lower end.
function scaleOf(values) {
  const logs = view.scale === "log", known = values.filter((x) => x !== null && (x > 0 || !logs));
  const low = known.reduce((a, b) => Math.min(a, b), Infinity), high = known.reduce((a, b) => Math.max(a, b), 0);
  if (!(high > low)) return { place: () => 0.5, value: () => high };
  if (!logs) return { place: (x) => (x - low) / (high - low), value: (t) => low + t * (high - low) };
  const whole = Math.log(high / low);
  return { place: (x) => (x > 0 ? Math.log(x / low) / whole : 0), value: (t) => low * Math.exp(t * whole) };
}

function expertMap() {
  const { layers, use } = data.experts, byUse = view.order === "use", isUse = view.measure === "use";
  const [title, written] = MEASURES[view.measure], grid = gridOf(view);
  const n = grid[0].length, scale = scaleOf(grid.flat()), upright = narrow.matches;
  const order = grid.map((_, i) => (byUse ? upTo(n).sort((a, b) => use[i][b] - use[i][a]) : upTo(n)));
  const cell = (row, column) => (upright ? [column, order[column][row]] : [row, order[row][column]]);
  const colour = (x) => (x === null ? null : isUse && x === 0 ? UNSEEN : viridis(scale.place(x)));
  const across = every(upTo(n), 2 ** Math.max(0, Math.round(Math.log2(n / 9)))), down = every(layers, upright ? 6 : 3);
  const [rows, columns] = upright ? [across, down] : [down, across];
  const experts = byUse ? `experts, the highest ${USE.toLowerCase()} first` : "experts";
  $("choose-projection").disabled = isUse;
  map("experts-map", {
    rows, columns, kind: "dense", axis: upright ? `layers across, ${experts} down` : `${experts} across, layers down`,
    height: `${rows.length * (upright ? 0.14 : 0.8)}rem`, hint: "Point at a cell, or use the arrow keys.",
    label: `${title} of every expert${isUse ? "" : `, ${view.projection}`}. Move with the arrow keys.`,
    describe: (row, column) => expertWords(...cell(row, column)),
    content: pixels(rows.length, columns.length, (row, column) => {
      const [i, e] = cell(row, column);
      return colour(grid[i][e]);
    }),
  });
  const legend = {
    use: [make("span", {}, "1 × is the mean of the layer"), make("span", {}, swatch(UNSEEN), "none at all")],
    relative: [make("span", {}, `1 × is the level: ${levelWords()}`)],
  };
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => placed(written(scale.value(t)), t));
  $("experts-legend").replaceChildren(
    make("div", { role: "img", ariaLabel: `Colours from ${written(scale.value(0))} to ${written(scale.value(1))}` },
      pixels(1, 256, (_, i) => viridis(i / 255)), make("div", { className: "ticks" }, ...ticks)),
    ...legend[view.measure] ?? []);
}

function expertTable() {
  const { layers, types, error } = data.experts, projections = Object.keys(types);
  const median = (sorted) => (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
  const figures = (projection, i) => {
    const row = error[projection][i], sorted = row.filter((x) => x !== null).sort((a, b) => a - b);
    const type = types[projection][i];
    if (!sorted.length) return [type, NONE, NONE, NONE, NONE];
    return [type, percent(sorted[0]), percent(median(sorted)), percent(sorted.at(-1)), `${row.indexOf(sorted.at(-1))}`];
  };
  const columns = projections.flatMap((name) => [[name, "left"], ["least"], ["median"], ["most"], ["expert"]]);
  table("experts-table", [["Layer", "left"], ...columns],
    layers.map((layer, i) => [`${layer}`, ...projections.flatMap((projection) => figures(projection, i))]));
}

const levelWords = () => [...new Set(Object.values(data.experts.types).flat())].filter((type) => data.levels[type])
  .map((type) => `${type} ${percent(data.levels[type])}`).join(", ");

function experts() {
  const { layers, error } = data.experts;
  const lost = data.imatrix ? "output's energy that is lost, weighted by importance" : "weights' energy that is lost";
  const count = error.gate[0].length;
  $("experts-lead").textContent = `${layers.length} layers of ${count} experts. Error is the share of the ${lost}; a ` +
    "type's level is the median of all that has the type. What is bright does worse than its type does elsewhere." +
    (data.n_worst ? "" : " No expert stands out from its tensor.");
  controls();
  expertMap();
  expertTable();
}

// ---- error by layer ------------------------------------------------------------------------------------------------

/** Of the lines, in the unit that was chosen. */
const byLayer = (line) => line[view.layers === "relative" ? "relative" : "by_layer"];
const inUnit = (x) => (view.layers === "relative" ? times : percent)(x);

function layerMap() {
  const n = data.n_layer, all = data.errors.flatMap((line) => Object.values(byLayer(line))).filter((x) => x > 0);
  const low = Math.min(...all) / 1.15, high = Math.max(...all) * 1.15;
  const height = (x) => 1 - Math.log(x / low) / Math.log(high / low);
  const steps = logSteps(low, high);
  const path = (line) => {
    const values = byLayer(line), point = (layer) => `${100 * (layer + 0.5) / n} ${100 * height(values[layer])}`;
    const points = upTo(n).map((layer) => (values[layer] > 0 ? point(layer) : ""));
    const d = points.map((point, i) => (point && `${points[i - 1] ? "L" : "M"}${point}`)).join("");
    return set(draw("path", { d, "stroke-dasharray": LINES[line.name][1] }), { key: LINES[line.name][0] });
  };
  const grid = steps.map((x) => draw("line", { x1: 0, x2: 100, y1: 100 * height(x), y2: 100 * height(x) }));
  const words = (layer) => data.errors.filter((line) => byLayer(line)[layer] != null)
    .map((line) => `${line.name} ${inUnit(byLayer(line)[layer])}`);
  map("layers-map", {
    rows: [""], columns: every(upTo(n), narrow.matches ? 10 : 5), axis: "layer", height: "19rem", kind: "plot",
    label: "Error by layer. Move with the left and right arrow keys.", hint: "Point at a layer, or use the arrow keys.",
    describe: (_, layer) => [`Layer ${layer}`, ...words(layer)].join(" · "),
    content: draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
      ...grid, ...data.errors.map(path)),
  });
  $("layers-map").querySelector(".names").replaceChildren(
    ...steps.map((x) => widest(inUnit(x))), ...steps.map((x) => placed(inUnit(x), height(x))));
}

function layers() {
  const weighting = data.experts?.count ? "; experts count by their use" : "";
  $("layers-lead").textContent = `Means of each layer, on a log scale${weighting}. 1 × is the level of a tensor's type.`;
  const units = { relative: "Error ÷ level", error: "Error" };
  $("layers-controls").append(choice("Show", "layers", units, layerMap));
  $("layers-legend").append(...data.errors.map(({ name, mean }) => {
    const [stroke, dashes] = LINES[name], ends = { x1: 1, x2: 27, y1: 5, y2: 5 };
    const key = draw("svg", { width: 28, height: 10, "aria-hidden": "true" },
      draw("line", { ...ends, stroke, "stroke-width": 2.5, "stroke-dasharray": dashes }));
    return make("li", {}, key, " ", make("b", {}, name), ` ${percent(mean)}`);
  }));
  layerMap();
  const row = (layer) => [`${layer}`, ...data.errors.map(({ by_layer }) => percent(by_layer[layer] ?? null))];
  table("layers-table", [["Layer", "left"], ...data.errors.map(({ name }) => [name])],
    upTo(data.n_layer).map(row), ["Mean", ...data.errors.map(({ mean }) => percent(mean))]);
}

// ---- who stands out, and what calibration saw ---------------------------------------------------------------------

function worst() {
  const { use, count, error } = data.experts, { sigmas, times: least } = data.stands_out, { n_worst: n } = data;
  const all = grouped(Object.values(error).flat(2).length);
  $("worst-lead").textContent = `${counted(n, "figure")} of ${all} ` +
    `${n === 1 ? "is" : "are"} at least ${least} times the median of the same tensor and more than ${sigmas} standard ` +
    `deviations above it (in logarithms).${n > data.worst.length ? ` The first ${data.worst.length}:` : ""}`;
  const columns = [["Layer", "left"], ["Expert"], ["Projection", "left"], ["Type", "left"], ["Error"], ["× median"]];
  columns.push(...(use ? [[USE]] : []), ...(count ? [["Tokens"]] : []));
  table("worst-table", columns, data.worst.map((found) => [
    `${found.layer}`, `${found.expert}`, found.projection, found.type, percent(found.error), times(found.ratio),
    ...(use ? [times(found.use)] : []), ...(count ? [grouped(found.count)] : []),
  ]));
}

function coverage() {
  const { experts, median, p5, n_unseen, unseen } = data.coverage;
  const [half, most] = [median, p5].map((n) => grouped(Math.floor(n)));
  $("coverage-lead").textContent = `Half of the ${grouped(experts)} experts met at least ${half} tokens, ` +
    `95 % at least ${most}. ${n_unseen ? `${grouped(n_unseen)} were never seen.` : "All were seen."}`;
  const columns = [["Layer", "left"], ["Experts never seen", "left wide"]];
  if (n_unseen) table("coverage-table", columns, Object.entries(unseen));
}

