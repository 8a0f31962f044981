// The settings dialog: what is typed there is kept in this browser, and what is empty is not sent.

import { $ } from "./dom.js";

const NAME = "stepgguf.settings", form = document.querySelector("#settings form");
let typed;

/** name -> what was typed. */
export const settings = () => typed;

function read() {
  typed = Object.fromEntries([...new FormData(form)].filter(([, value]) => value.trim()));
  try {
    localStorage.setItem(NAME, JSON.stringify(typed));
  } catch { /* the storage is full: save() says so, and they hold until the page is left */ }
  const n = Object.keys(typed).length;
  $("settings-button").textContent = n ? `Settings (${n})` : "Settings";
}

try {
  for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem(NAME)) ?? {})) {
    const field = form.elements.namedItem(name);
    if (field) field.value = value;
  }
} catch { /* damaged: the defaults hold */ }
form.oninput = read;
read();
$("defaults").onclick = () => { form.reset(); read(); };
$("settings-button").onclick = () => $("settings").showModal();
