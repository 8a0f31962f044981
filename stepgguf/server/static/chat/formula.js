// TeX to MathML, which browsers draw themselves. Temml is a classic script: `temml` is global.

import { make } from "./dom.js";

const LONGEST = 5_000; // characters; a longer formula is shown as it was written
export const FORMULA = /\$\$[\s\S]+?\$\$|\\\([\s\S]+?\\\)|\\\[[\s\S]+?\\\]|\$(?![\s$])(?:[^$\n]*?[^\s$\\])\$(?!\d)/y;

/** source: with its delimiters. What Temml cannot read is shown as it was written. */
export function formula(source) {
  const n = source.startsWith("$") && !source.startsWith("$$") ? 1 : 2, displayMode = /^(\$\$|\\\[)/.test(source);
  const node = make("span", { className: displayMode ? "math display" : "math" });
  try {
    if (source.length > LONGEST) throw new RangeError("too long");
    temml.render(source.slice(n, -n), node, { displayMode, annotate: true, throwOnError: true, trust: false });
  } catch {
    node.classList.add("source");
    node.replaceChildren(source);
  }
  return node;
}
