// TeX to MathML, which browsers draw themselves. Temml is a classic script: `temml` is global.

import { make } from "./dom.js";

const LONGEST = 5_000; // characters; a longer formula is shown as it was written
export const FORMULA = new RegExp([
  String.raw`\$\$[^]{1,2000}?\$\$`, String.raw`\\\([^]{1,2000}?\\\)`, String.raw`\\\[[^]{1,2000}?\\\]`,
  String.raw`\$(?![\s$])[^$\n]*?[^\s$\\]\$(?!\d)`, // not $5 and $6
].join("|"), "y");

const CLOSES = { "$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]" };

/** source: with its delimiters. What is not closed yet, or what Temml cannot read, is shown as it was written. */
export function formula(source) {
  const open = /^(\$\$?|\\.)/.exec(source)[0], n = open.length, displayMode = open === "$$" || open === "\\[";
  const node = make("span", { className: displayMode ? "math display" : "math", title: source });
  try {
    if (source.length > LONGEST || !source.slice(n).endsWith(CLOSES[open])) throw new RangeError(source);
    temml.render(source.slice(n, -n), node, { displayMode, wrap: "tex", throwOnError: true });
  } catch {
    node.classList.add("source");
    node.removeAttribute("title");
    node.replaceChildren(source);
  }
  return node;
}
