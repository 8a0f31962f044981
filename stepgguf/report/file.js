
// What the file holds: the headline, sizes, types. Each is drawn from its part of the data (figures.py), and everything
// that is written there becomes text nodes.

const data = JSON.parse($("data").textContent);
const narrow = matchMedia("(max-width: 40rem)");
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const [PER, UNIT] = data.values < 1e9 ? [1e6, "M"] : [1e9, "B"]; // one unit for all that is compared
const weights = (n) => `${(n / PER).toFixed(3)} ${UNIT}`;
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

// ---- the headline --------------------------------------------------------------------------------------------------

function tile(title, text, more) {
  const [value, unit = ""] = text.split(" ");
  $("tiles").append(make("div", {}, make("dt", {}, title),
    make("dd", { className: "value" }, value, make("span", { className: "unit" }, ` ${unit}`)),
    make("dd", { className: "more" }, more)));
}

function headline() {
  const [first] = data.files; // without a manifest nobody knows whether there was an importance matrix
  const imatrix = data.imatrix ? "with importance matrix" : data.made_by && "without importance matrix";
  $("kind").textContent = [data.type, imatrix].filter(Boolean).join(" · ");
  $("name").textContent = data.name;
  const more = data.files.length > 1 ? ` and ${data.files.length - 1} more` : "";
  $("file").textContent = [`${first}${more}`, data.made_by].filter(Boolean).join(" · ");
  tile("Size", binary(data.bytes), `${bytes(data.bytes)}, ${counted(data.tensors, "tensor")}`);
  tile("Bits per weight", data.bpw.toFixed(3), `${weights(data.values)} weights`);
  tile("Read per token", bytes(data.read_per_token), `${share(data.read_per_token, data.bytes)} of the file`);
  const experts = data.errors.filter((line) => line.name.startsWith("experts"));
  if (experts.length) {
    const mean = sum(experts.map((line) => line.mean)) / experts.length;
    tile("Error of the experts", percent(mean),
      experts.map((line) => `${line.name.replace("experts: ", "")} ${digits(100 * line.mean)}`).join(" · "));
  }
  $("missing").append(...data.missing.map((text) => make("p", { className: "note" }, ...prose(text))));
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

function typesByLayer() {
  typeMap();
  typeLegend();
  typeTable();
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
