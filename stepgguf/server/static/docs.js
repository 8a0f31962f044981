// The OpenAPI document as a page: the routes by dialect, and the fields in the order in which the models have them,
// those that must be there first.

const make = (tag, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};
const base = new URL(".", location.href).href.slice(0, -1);
const spec = await (await fetch("openapi.json")).json();

/** A description; what stands in backquotes is code. */
const prose = (text = "") =>
  make("p", {}, ...text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part)));

const follow = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema ?? {});

/** A type in words. What may be left out may be null. */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop().split("__").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.items) return typeOf(schema.items).replace(/^.* \| .*$/, "($&)") + "[]";
  const either = schema.anyOf ?? schema.oneOf;
  if (either) return [...new Set(either.filter((one) => one.type !== "null").map(typeOf))].join(" | ");
  return schema.type ?? "any";
}

/** The named schemas that a type is made of. */
const inside = (schema) =>
  schema.$ref ? [schema] : [schema.items, ...(schema.anyOf ?? schema.oneOf ?? [])].filter(Boolean).flatMap(inside);

function fields(schema, seen = new Set()) {
  const { properties = {}, required = [], description } = follow(schema), entries = Object.entries(properties);
  const rows = [true, false].flatMap((needed) => entries.filter(([name]) => required.includes(name) === needed));
  const table = make("dl", { className: "fields" }, ...rows.map(([name, field]) => make("div", {},
    make("dt", {}, make("code", {}, name), ...(required.includes(name) ? [make("em", {}, "required")] : [])),
    make("dd", {}, make("code", {}, typeOf(field)), ...(field.description ? [prose(field.description)] : [])))));
  const named = rows.flatMap(([, field]) => inside(field)).filter(({ $ref }) => !seen.has($ref) && seen.add($ref));
  return [
    ...(description ? [prose(description)] : []), ...(rows.length ? [table] : []),
    ...named.map((one) => make("details", {}, make("summary", {}, typeOf(one)), ...fields(one, seen))),
  ];
}

const EXAMPLES = ["messages", "prompt", "text", "tokens", "input", "max_tokens"];

/** A request that works as it stands: the fields that have an example and are needed, or bound the answer. */
function example(path, schema) {
  const { properties = {}, required = [] } = follow(schema), needed = [...required, ...EXAMPLES];
  const wanted = Object.entries(properties).filter(([name, { examples }]) => examples && needed.includes(name));
  const data = JSON.stringify(Object.fromEntries(wanted.map(([name, { examples: [first] }]) => [name, first])));
  return `curl ${base}${path} -H 'content-type: application/json' \\\n  -d '${data.replaceAll("'", "'\\''")}'`;
}

function route(path, verb, { description, requestBody, responses }) {
  const asked = requestBody?.content["application/json"]?.schema;
  const answer = responses["200"]?.content?.["application/json"]?.schema;
  const part = (title, ...content) => [make("h3", {}, title), ...content];
  return make("details", { className: "route" },
    make("summary", {}, make("b", {}, verb.toUpperCase()), make("code", {}, path),
      make("span", {}, description?.split(/(?<=\.)\s/)[0].replaceAll("`", "") ?? "")),
    prose(description),
    ...(asked ? part("Try it", make("pre", { tabIndex: 0 }, example(path, asked))) : []),
    ...(asked ? part("Request", ...fields(asked)) : []), ...(answer ? part("Answer", ...fields(answer)) : []));
}

document.getElementById("title").textContent = `${spec.info.title} ${spec.info.version}`;
document.getElementById("summary").textContent = spec.info.summary;
for (const place of document.querySelectorAll(".origin")) place.textContent = base;
const sections = new Map();
for (const [path, verbs] of Object.entries(spec.paths)) {
  for (const [verb, operation] of Object.entries(verbs)) {
    const name = operation.tags?.[0] ?? "Others";
    if (!sections.has(name)) sections.set(name, []);
    sections.get(name).push(route(path, verb, operation));
  }
}
for (const [name, routes] of sections) document.querySelector("main").append(make("h2", {}, name), ...routes);
