// The API key, in this tab only, and the form that asks for it.

import { $ } from "./dom.js";

const NAME = "stepgguf.key";

export const key = () => sessionStorage.getItem(NAME);

/** The server answered 401 to this key: the form opens. A wrong one is forgotten, and the form says so. */
export function askForKey(given) {
  if (given !== key()) return; // another one has been typed since
  const field = $("key-field"), isWrong = Boolean(given), isNew = $("key").hidden;
  if (isWrong) {
    sessionStorage.removeItem(NAME);
    $("key-problem").textContent = "The server does not take this key. Please type it again.";
    field.ariaInvalid = "true";
    field.value = "";
  }
  $("key").hidden = false;
  if (isNew || isWrong) field.focus();
}

export function keyIsRight() {
  $("key").hidden = true;
  $("key-field").value = $("key-problem").textContent = "";
  $("key-field").ariaInvalid = "false";
}

/** use(): with the key that was typed. */
export function onKey(use) {
  $("key").onsubmit = (event) => {
    event.preventDefault();
    $("key-problem").textContent = "";
    sessionStorage.setItem(NAME, $("key-field").value.trim());
    use();
  };
}
