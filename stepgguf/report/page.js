
// The page: its sections in the order in which they matter, those that have nothing to show left out.

function provenance() {
  const { imatrix, recipe } = data;
  const facts = {
    File: data.files.join(", "), Type: data.type, Source: data.source, "Made by": data.made_by,
    "Importance matrix": imatrix ? imatrix.file ?? "yes" : data.made_by && "none", Prior: imatrix?.prior,
    Datasets: imatrix?.datasets.join(", "),
  };
  for (const [title, text] of Object.entries(facts)) {
    if (text) $("provenance").append(make("dt", {}, title), make("dd", {}, text));
  }
  $("recipe").hidden = !recipe;
  $("recipe").textContent = recipe;
}

const sections = {
  frontier: data.frontier && frontier, experts: data.experts && experts, layers: data.errors.length && layers, worst: data.n_worst && worst,
  coverage: data.coverage && coverage, sizes, types: typesByLayer, made: provenance,
};
headline();
for (const [id, fill] of Object.entries(sections)) {
  if (fill) fill();
  else $(id).hidden = true;
}
narrow.onchange = () => {
  typeMap();
  if (sections.experts) expertMap();
  if (sections.layers) layerMap();
};
