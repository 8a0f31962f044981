// The list of chats, and what the search finds in them.

import { chats, newestFirst, search } from "./chats.js";
import { $, button, counted, make } from "./dom.js";

let remove;

/** gone(chats): they are to be deleted. changed(): the search is another one. */
export function listen(gone, changed) {
  remove = gone;
  $("search").oninput = changed;
  $("search").onkeydown = (event) => {
    if (event.key === "Escape") {
      $("search").value = "";
      changed();
    } else if (event.key === "Enter" || event.key === "ArrowDown") {
      event.preventDefault();
      const first = document.querySelector("aside li a");
      if (event.key === "Enter") first?.click();
      else first?.focus();
    }
  };
}

export function showList(current) {
  const words = $("search").value.trim(), found = words ? search(words) : newestFirst().map((chat) => ({ chat }));
  document.querySelector("aside ul").replaceChildren(...found.map(({ chat, index = -1, before, match, after }) => {
    const href = index < 0 ? `#${chat.id}` : `#${chat.id}/${index}`, here = chat === current && { ariaCurrent: "page" };
    const place = index < 0 ? [] : [make("small", {}, before, make("mark", {}, match), after)];
    const gone = button("×", "", () => remove([chat]), { ariaLabel: `Delete ${chat.title}` });
    const link = make("a", { href, title: chat.title, ...here }, make("span", {}, chat.title), ...place);
    return make("li", {}, link, gone);
  }));
  $("found").textContent = words ? `${found.length ? counted(found.length, "chat") : "No chats"} found` : "";
  $("export").disabled = $("delete-all").disabled = !chats.size;
  document.title = current.title ? `${current.title} · stepgguf` : "stepgguf";
}
