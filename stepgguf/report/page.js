
// The sections, each from its part of the data (figures.py). Everything written in it becomes text nodes.

const data = JSON.parse($("data").textContent);
const narrow = matchMedia("(max-width: 40rem)");
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const upTo = (n) => [...Array(n).keys()];

// ---- colours of roles and types -------------------------------------------------------------------------------------

// Okabe and Ito's colours for categories (Color Universal Design, 2008), and the ink that is read on each.
const GROUPS = {
  "routed experts": ["#0072b2", "#fff"], "shared experts": ["#56b4e9", "#111"], attention: ["#e69f00", "#111"],
  "dense FFN": ["#009e73", "#111"], embeddings: ["#cc79a7", "#111"], output: ["#d55e00", "#111"],
  MTP: ["#f0e442", "#111"], other: ["#918b82", "#111"],
};
// The same for lines, with dashes to tell them apart without colour.
const LINES = {
  "experts: gate": ["#0072b2", "none"], "experts: up": ["#56b4e9", "none"], "experts: down": ["#d55e00", "none"],
  "shared experts": ["#009e73", "6 4"], attention: ["#e69f00", "2 4"], "dense FFN": ["#cc79a7", "10 3 2 3"],
};

// Even steps of lightness (OKLCH) for even steps of log bits, from pale yellow to deep teal. Floats are grey.
const isFloat = (type) => data.floats.includes(type);
const depths = Object.keys(data.bits).filter((type) => !isFloat(type)).map((type) => Math.log2(data.bits[type]));
function typeColour(type) {
  if (isFloat(type)) return GROUPS.other[0];
  const low = Math.min(...depths), range = Math.max(...depths) - low;
  const t = range ? (Math.log2(data.bits[type]) - low) / range : 0.5;
  return `oklch(${0.9 - 0.52 * t} ${0.1 - 0.025 * t} ${100 + 95 * t})`;
}
const UNSEEN = "#d55e00"; // vermillion: not in viridis

// ---- the headline --------------------------------------------------------------------------------------------------

function tile(title, text, more) {
  const [value, unit = ""] = text.split(" ");
  $("tiles").append(make("div", {}, make("dt", {}, title),
    make("dd", { className: "value" }, value, make("span", { className: "unit" }, ` ${unit}`)),
    make("dd", { className: "more" }, more)));
}

function headline() {
  const [first] = data.files, imatrix = data.imatrix ? "with importance matrix" : "without importance matrix";
  $("kind").textContent = [data.type, imatrix].filter(Boolean).join(" · ");
  $("name").textContent = data.name;
  const more = data.files.length > 1 ? ` and ${data.files.length - 1} more` : "";
  $("file").textContent = `${first}${more} · ${data.made_by}`;
  tile("Size", binary(data.bytes), `${bytes(data.bytes)}, ${counted(data.tensors, "tensor")}`);
  tile("Bits per weight", data.bpw.toFixed(3), `${weights(data.values)} weights`);
  tile("Read per token", bytes(data.read_per_token), `${share(data.read_per_token, data.bytes)} of the file`);
  const experts = data.errors.filter((line) => line.name.startsWith("experts"));
  if (experts.length) {
    const mean = sum(experts.map((line) => line.mean)) / experts.length;
    tile("Error of the experts", percent(mean),
      experts.map((line) => `${line.name.replace("experts: ", "")} ${digits(100 * line.mean)}`).join(" · "));
  }
  $("missing").append(...data.missing.map((text) => make("p", { className: "note" }, text)));
}

// ---- sizes ---------------------------------------------------------------------------------------------------------

function bar(title, key, whole) {
  const parts = data.groups.filter((group) => group[key] > 0).map((group) => {
    const [colour, ink] = GROUPS[group.group], part = share(group[key], whole);
    const element = make("i", { title: `${group.group}: ${bytes(group[key])}, ${part}` },
      make("span", {}, part), make("span", {}, group.group));
    element.style.flex = `${group[key] / whole} 0 0`;
    return set(element, { key: colour, ink });
  });
  $("bars").append(make("div", { className: "bar" }, make("span", {}, title, make("small", {}, bytes(whole))),
    make("div", { role: "img", ariaLabel: `${title} by role: the table below has the numbers` }, ...parts)));
}

function sizes() {
  const { groups, bytes: size, read_per_token: read } = data;
  const most = groups.reduce((a, b) => (b.bytes > a.bytes ? b : a));
  $("sizes-lead").textContent = `Of the file, ${share(most.bytes, size)} is ${most.group}; of what a token reads, ` +
    `${share(most.read_per_token, read)}.`;
  bar("On disk", "bytes", size);
  bar("Read per token", "read_per_token", read);
  table("sizes-table", [
    ["Role", "left"], ["Size"], ["Share"], ["Read per token"], ["Share"], ["bpw"], ["Weights"], ["Tensors"],
  ], groups.map((group) => [
    make("span", {}, swatch(GROUPS[group.group][0]), group.group), bytes(group.bytes), share(group.bytes, size),
    bytes(group.read_per_token), share(group.read_per_token, read), (8 * group.bytes / group.values).toFixed(2),
    weights(group.values), grouped(group.tensors),
  ]), ["All", bytes(size), "", bytes(read), "", data.bpw.toFixed(2), weights(data.values), grouped(data.tensors)]);
}

// ---- types ---------------------------------------------------------------------------------------------------------

const tensors = data.types.map(([layer, role, type, size, error]) => ({ layer, role, type, size, error }));
const types = Object.keys(data.bits).sort((a, b) => data.bits[a] - data.bits[b]);
const ORDER = `attn_q attn_k attn_v attn_output attn_gate ffn_gate_inp ffn_gate ffn_up ffn_down ffn_gate_shexp
  ffn_up_shexp ffn_down_shexp ffn_gate_exps ffn_up_exps ffn_down_exps`.split(/\s+/);
const rank = (role) => (ORDER.indexOf(role) + ORDER.length + 1) % (ORDER.length + 1); // unknown ones last
const roles = [...new Set(tensors.map(({ role }) => role))].sort((a, b) => rank(a) - rank(b));
const size = (members) => bytes(sum(members.map((tensor) => tensor.size)));

function tensorWords({ layer, role, type, size, error }) {
  const where = layer === null ? role : `Layer ${layer}${layer < data.n_layer ? "" : " (MTP)"} · ${role}`;
  const words = [where, `${type}, ${digits(data.bits[type])} bits`, bytes(size)];
  return [...words, ...(error === null ? [] : [`error ${percent(error)}`])].join(" · ");
}

function typeMap() {
  const [inLayers, others] = [true, false].map((inside) => tensors.filter(({ layer }) => (layer !== null) === inside));
  const rows = roles.filter((role) => inLayers.some((tensor) => tensor.role === role));
  const layers = [...new Set(inLayers.map(({ layer }) => layer))].sort((a, b) => a - b);
  const places = new Map(inLayers.map((tensor) => [`${tensor.layer} ${tensor.role}`, tensor]));
  const at = (row, column) => places.get(`${layers[column]} ${rows[row]}`);
  map("types-map", {
    rows, columns: every(layers, narrow.matches ? 10 : 5), height: `${rows.length * 1.15}rem`, kind: "gaps",
    axis: layers.at(-1) < data.n_layer ? "layer" : `layer; MTP from ${data.n_layer} on`,
    label: "Types by role and layer. Move with the arrow keys.",
    hint: others.map(({ role, type }) => `${role} ${type}`).join(" · "),
    describe: (row, column) => {
      const found = at(row, column);
      return found ? tensorWords(found) : `Layer ${layers[column]} has no ${rows[row]}`;
    },
    content: pixels(rows.length, layers.length, (row, column) => {
      const found = at(row, column);
      return found ? typeColour(found.type) : null;
    }),
  });
}

function typeLegend() {
  for (const type of types) {
    const all = tensors.filter((tensor) => tensor.type === type);
    if (!all.length) continue;
    const text = ` ${digits(data.bits[type])} bits · ${counted(all.length, "tensor")}, ${size(all)}`;
    $("types-legend").append(make("li", {}, swatch(typeColour(type)), make("b", {}, type), text));
  }
}

function typeTable() {
  const rows = roles.flatMap((role) => types.flatMap((type) => {
    const all = tensors.filter((tensor) => tensor.role === role && tensor.type === type);
    return all.length ? [[role, type, ranges(all.flatMap(({ layer }) => layer ?? [])) || NONE, size(all)]] : [];
  }));
  table("types-table", [["Role", "left"], ["Type", "left"], ["Layers", "left wide"], ["Size"]], rows);
}

// ---- every expert --------------------------------------------------------------------------------------------------

const USE = data.experts?.count ? "Use" : "Signal"; // figures.py: what is known of an expert's use
const MEASURES = { error: ["Error", percent], rmse: ["RMSE", digits], use: [USE, times] };
const view = { projection: "down", measure: "error", scale: "log", order: "number" };

function choice(title, name, options) {
  const radio = ([value, text]) => make("label", {}, make("input", {
    type: "radio", name, value, checked: view[name] === value, onchange: () => { view[name] = value; expertMap(); },
  }), text);
  return make("fieldset", { id: `choose-${name}` }, make("legend", {}, title), ...Object.entries(options).map(radio));
}

function controls() {
  const { use } = data.experts;
  $("controls").append(
    choice("Show", "measure", { error: "Error", rmse: "RMSE", ...(use && { use: USE }) }),
    choice("Projection", "projection", { gate: "gate", up: "up", down: "down" }),
    choice("Scale", "scale", { log: "log", linear: "linear" }),
    ...(use ? [choice("Experts by", "order", { number: "number", use: USE.toLowerCase() })] : []));
}

function expertWords(i, e) {
  const { layers, types, error, rmse, use, count } = data.experts, { projection } = view;
  const words = [`Layer ${layers[i]}, expert ${e}`, `${projection} ${types[projection][i]}`];
  words.push(`error ${percent(error[projection][i][e])}`);
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
  const [title, written] = MEASURES[view.measure], grid = isUse ? use : data.experts[view.measure][view.projection];
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
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((t) => placed(written(scale.value(t)), t));
  $("experts-legend").replaceChildren(
    make("div", { role: "img", ariaLabel: `Colours from ${written(scale.value(0))} to ${written(scale.value(1))}` },
      pixels(1, 256, (_, i) => viridis(i / 255)), make("div", { className: "ticks" }, ...ticks)),
    ...(isUse ? [make("span", {}, "1 × is the mean of the layer"), make("span", {}, swatch(UNSEEN), "none at all")] : []));
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

function experts() {
  const { layers, error } = data.experts;
  const lost = data.imatrix ? "output's energy that is lost, weighted by importance" : "weights' energy that is lost";
  const count = error.gate[0].length;
  $("experts-lead").textContent = `${layers.length} layers of ${count} experts. Error is the share of the ${lost}.`;
  controls();
  expertMap();
  expertTable();
}

// ---- error by layer ------------------------------------------------------------------------------------------------

function layerMap() {
  const n = data.n_layer, all = data.errors.flatMap((line) => Object.values(line.by_layer)).filter((x) => x > 0);
  const low = Math.min(...all) / 1.15, high = Math.max(...all) * 1.15;
  const height = (x) => 1 - Math.log(x / low) / Math.log(high / low);
  const steps = upTo(9).flatMap((power) => [1, 2, 5].map((k) => k * 10 ** -power)).filter((x) => x > low && x < high);
  const path = ({ name, by_layer }) => {
    const point = (layer) => `${100 * (layer + 0.5) / n} ${100 * height(by_layer[layer])}`;
    const points = upTo(n).map((layer) => (by_layer[layer] > 0 ? point(layer) : ""));
    const d = points.map((point, i) => (point && `${points[i - 1] ? "L" : "M"}${point}`)).join("");
    return set(draw("path", { d, "stroke-dasharray": LINES[name][1] }), { key: LINES[name][0] });
  };
  const grid = steps.map((x) => draw("line", { x1: 0, x2: 100, y1: 100 * height(x), y2: 100 * height(x) }));
  const words = (layer) => data.errors.filter(({ by_layer }) => by_layer[layer] != null)
    .map(({ name, by_layer }) => `${name} ${percent(by_layer[layer])}`);
  map("layers-map", {
    rows: [""], columns: every(upTo(n), narrow.matches ? 10 : 5), axis: "layer", height: "19rem", kind: "plot",
    label: "Error by layer. Move with the left and right arrow keys.", hint: "Point at a layer, or use the arrow keys.",
    describe: (_, layer) => [`Layer ${layer}`, ...words(layer)].join(" · "),
    content: draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
      ...grid, ...data.errors.map(path)),
  });
  $("layers-map").querySelector(".names").replaceChildren(
    ...steps.map((x) => widest(percent(x))), ...steps.map((x) => placed(percent(x), height(x))));
}

function layers() {
  const weighting = data.experts?.count ? "; experts count by their use" : "";
  $("layers-lead").textContent = `Means of each layer, on a log scale${weighting}.`;
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

// ---- worst, coverage, provenance -----------------------------------------------------------------------------------

function worst() {
  const { use, count } = data.experts;
  const columns = [["Layer", "left"], ["Expert"], ["Projection", "left"], ["Type", "left"], ["Error"], ["× mean"]];
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

function provenance() {
  const { imatrix, recipe } = data;
  const facts = {
    File: data.files.join(", "), Type: data.type, Source: data.source, "Made by": data.made_by,
    "Importance matrix": imatrix ? imatrix.file ?? "yes" : "none", Prior: imatrix?.prior,
    Datasets: imatrix?.datasets.join(", "),
  };
  for (const [title, text] of Object.entries(facts)) {
    if (text) $("provenance").append(make("dt", {}, title), make("dd", {}, text));
  }
  $("recipe").hidden = !recipe;
  $("recipe").textContent = recipe;
}

const sections = {
  experts: data.experts && experts, layers: data.errors.length && layers, worst: data.worst.length && worst,
  coverage: data.coverage && coverage,
};
headline();
sizes();
typeMap(); typeLegend(); typeTable();
for (const [id, fill] of Object.entries(sections)) {
  if (fill) fill();
  else $(id).hidden = true;
}
provenance();
narrow.onchange = () => {
  typeMap();
  if (sections.experts) expertMap();
  if (sections.layers) layerMap();
};
