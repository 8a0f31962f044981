// The settings dialog: what is typed there is kept in this browser, and what is empty is not sent.

import { $ } from "./dom.js";

const NAME = "stepgguf.settings", form = document.querySelector("#settings form");
let typed = JSON.parse(localStorage.getItem(NAME) ?? "{}");

/** name -> what was typed. */
export const settings = () => typed;

function read() {
  typed = Object.fromEntries([...new FormData(form)].filter(([, value]) => value.trim()));
  localStorage.setItem(NAME, JSON.stringify(typed));
  const n = Object.keys(typed).length;
  $("settings-button").textContent = n ? `Settings (${n})` : "Settings";
}

for (const [name, value] of Object.entries(typed)) if (form.elements[name]) form.elements[name].value = value;
form.oninput = read;
read();
$("defaults").onclick = () => { form.reset(); read(); };
$("settings-button").onclick = () => $("settings").showModal();
