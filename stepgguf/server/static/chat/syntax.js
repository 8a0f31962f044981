// Code in colours: highlight.js finds the words, and elements are made of them without HTML in between.

import hljs from "../vendor/highlight.js/highlight.min.js";
import { make } from "./dom.js";

const LONGEST = 50_000; // characters; a longer block stays plain, since a growing one is read again with every frame

/** What highlight.js calls while it reads. A scope `title.function` becomes the class `hl-title`. */
class Nodes {
  root = make("code");
  #at = this.root;

  addText(text) { this.#at.append(text); }
  startScope(scope) { this.openNode(scope); }
  endScope() { this.closeNode(); }
  openNode(scope) {
    const span = make("span", { className: `hl-${scope.split(".")[0]}` });
    this.#at.append(span);
    this.#at = span;
  }
  closeNode() { this.#at = this.#at.parentNode; }
  __addSublanguage({ root }) { this.#at.append(...root.childNodes); }
  finalize() { this.root.normalize(); }
  toHTML() { return ""; }
}
hljs.registerAliases(["cuda", "cu", "metal", "hip"], { languageName: "cpp" });
hljs.configure({ __emitter: Nodes });

/** A <code>: plain where the language is not known or its grammar stumbles. */
export function highlighted(code, language) {
  if (code.length <= LONGEST && hljs.getLanguage(language)) {
    const { root } = hljs.highlight(code, { language, ignoreIllegals: true })._emitter;
    if (root.textContent === code) return root;
  }
  return make("code", {}, code);
}
