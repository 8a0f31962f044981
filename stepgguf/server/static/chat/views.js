// A question and an answer as elements. What the model or the user wrote becomes text nodes.
//
// Both are given `does`: what their buttons do, each with the index of its message.

import { runs } from "./answers.js";
import { draft, keepDraft, siblings } from "./chats.js";
import { button, clock, copy, counted, grouped, make, rate, showAll } from "./dom.js";
import { blocks, rendered } from "./markdown.js";

/** The way to the other versions of a message. */
function versions(chat, index, does) {
  const all = siblings(chat, index), at = all.indexOf(index);
  if (all.length < 2) return [];
  const to = (i, sign, ariaLabel) =>
    button(sign, "version", () => does.show(all[i]), { ariaLabel, disabled: !(i in all) });
  return [make("span", { className: "versions", role: "group", ariaLabel: "Versions" },
    to(at - 1, "‹", "Previous version"), `${at + 1} of ${all.length}`, to(at + 1, "›", "Next version"))];
}

export function questionView(chat, index, does) {
  const text = chat.messages[index].content, shown = make("p", {}, text), place = `${chat.id}/${index}`;
  const edit = button("Edit", "edit", () => {
    node.replaceChildren(editor(text));
    node.querySelector("textarea").focus();
  });
  const actions = make("div", { className: "actions" }, ...versions(chat, index, does), edit);
  const show = () => node.replaceChildren(shown, actions);
  const editor = (value) => {
    const area = make("textarea", { value, ariaLabel: "Edit the question" });
    const close = () => { keepDraft(place, ""); show(); edit.focus(); };
    const cancel = button("Cancel", "cancel", close), send = make("button", { className: "main" }, "Send");
    const form = make("form", {}, area, cancel, send);
    does.typing(area, form, (changed) => {
      close();
      does.ask(changed, chat.messages[index].parent);
    });
    area.addEventListener("input", () => keepDraft(place, area.value));
    requestAnimationFrame(area.oninput);
    return form;
  };
  const node = make("article", { className: "message question", ariaLabel: "Question" });
  if (draft(place)) node.append(editor(draft(place)));
  else show();
  return { node };
}

export function answerView(chat, index, does) {
  const answer = chat.messages[index], label = make("b"), words = make("span");
  const thoughts = make("div", { className: "thoughts" });
  const details = make("details", {}, make("summary", {}, label, make("span", { className: "tail" }, words)), thoughts);
  const now = button("Answer now", "answer-now", async () => {
    now.disabled = true;
    await does.answerNow(index).catch(() => { now.disabled = false; });
  });
  const thinking = make("div", { className: "thinking" }, details, now);
  const status = make("p", { className: "status" }), text = make("div", { className: "text" });
  const note = make("p"), stats = make("p", { className: "stats" });
  const actions = make("div", { className: "actions" }, ...versions(chat, index, does),
    button("Copy", "copy", ({ target }) => copy(answer.content, target)),
    button("Regenerate", "again", () => does.regenerate(index)));

  const showThoughts = () => {
    const paragraphs = details.open ? answer.reasoning.split(/\n{2,}/) : [];
    showAll(thoughts, paragraphs.map((key) => ({ key })), ({ key }) => make("p", {}, key));
  };
  details.ontoggle = showThoughts;
  const update = () => {
    const { reasoning, content, at, end } = answer, live = end === "running", still = live && at.thought === undefined;
    const lost = runs.get(chat.id)?.lost ?? true;
    status.hidden = !live || (at.first !== undefined && !lost);
    status.textContent = lost ? "Looking for the answer on the server …"
      : `Waiting for the first token, ${((clock() - at.asked) / 1000).toFixed(1)} s`;
    thinking.hidden = !reasoning;
    now.hidden = !still;
    label.textContent = thinkingLine(answer, still);
    words.textContent = still ? reasoning.slice(-160).replace(/\s+/g, " ") : "";
    showThoughts();
    showAll(text, blocks(content, live), rendered);
    note.textContent = live ? "" : ending(answer);
    note.className = end === "error" ? "note wrong" : "note";
    stats.textContent = live ? progress(answer) : figures(answer);
    note.hidden = !note.textContent;
    stats.hidden = !stats.textContent;
  };
  update();
  const parts = [thinking, text, status, note, stats, actions];
  return { node: make("article", { className: "message answer", ariaLabel: "Answer" }, ...parts), update };
}

function thinkingLine({ at, usage, tokens, thoughts }, still) {
  const n = usage?.output_tokens_details?.reasoning_tokens ?? thoughts ?? tokens;
  const took = ((still ? clock() : at.thought ?? at.last) - at.first) / 1000, known = at.first && took >= 0;
  return [
    still ? `Thinking${known ? ` ${took.toFixed(1)} s` : ""}` : known ? `Thought for ${took.toFixed(1)} s` : "Thought",
    n && counted(n, "token"), still && speedOf(tokens, at),
  ].filter(Boolean).join(", ");
}

/** While the text comes. */
function progress({ tokens, thoughts, at }) {
  if (thoughts === undefined) return "";
  return [counted(tokens - thoughts, "token"), speedOf(tokens, at)].filter(Boolean).join(" · ");
}

/** "" where it is not known, as of an answer that came in one piece. */
function speedOf(tokens, { first, last }) {
  const known = first && last - first > 20 && tokens > 1;
  return known ? rate(1000 * (tokens - 1) / (last - first)) : "";
}

function ending({ end, error, content, max_tokens, usage }) {
  const lost = "The server no longer has this answer. What had come of it is kept; Regenerate asks again.";
  if (end !== "length") return { error, stopped: "Stopped.", lost }[end] ?? "";
  if (!max_tokens || usage?.output_tokens < max_tokens)
    return "Cut off: the context is full. Start a new chat, or start the server with a larger --ctx.";
  const why = content ? "" : " All of them went into thinking; a lower thinking effort leaves some for the answer.";
  return `Cut off at ${grouped(max_tokens)} tokens.${why} Raise the limit in the settings or clear it, then regenerate.`;
}

function figures({ usage, at }) {
  if (usage?.output_tokens === undefined) return "";
  const { output_tokens: all, input_tokens: prompt, input_tokens_details: { cached_tokens: cached } } = usage;
  const { reasoning_tokens: thought, reasoning_cut: cut } = usage.output_tokens_details;
  return [
    thought ? `${grouped(thought)} thinking + ${grouped(all - thought)} answer tokens` : counted(all, "token"),
    speedOf(all, at),
    at.first && at.asked && `first after ${((at.first - at.asked) / 1000).toFixed(2)} s`,
    `prompt ${grouped(prompt)}, ${grouped(cached)} cached`,
    { loop: "the thinking repeated itself and was ended", budget: "the thinking was ended by its limit" }[cut],
  ].filter(Boolean).join(" · ");
}
