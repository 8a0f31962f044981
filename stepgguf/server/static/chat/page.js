// The chat page: what the user does, and what is shown then.
//
//     ask -> chats.add -> answers.run -> update, once a frame -> views
//
// Everything comes from this server, so the page works offline and under a strict policy.

import { answerNow, discard, newAnswer, run, runs, stop } from "./answers.js";
import * as store from "./chats.js";
import { $, copy, grouped, make, say } from "./dom.js";
import { keyIsRight, onKey } from "./key.js";
import { listen, showList } from "./list.js";
import { api } from "./server.js";
import "./settings.js";
import { coarse, typing } from "./typing.js";
import { answerView, questionView } from "./views.js";

const { chats } = store;
let current, context = null; // tokens; null until the server has told
let views = []; // of the messages that are shown: {index, message, node, update}

// ---- what the server is doing --------------------------------------------------------------------------------------

async function look() {
  const show = (text, kind) => { $("state").textContent = text; $("state").className = kind; };
  try {
    const { running, queued } = await (await api("health")).json();
    show(running ? `${running} running${queued ? `, ${queued} waiting` : ""}` : "ready", "");
    if (context !== null) return;
    const { data: [model] } = await (await api("v1/models")).json();
    context = model.context_length;
    $("model").textContent = $("model").title = model.id;
    keyIsRight();
    showContext();
    resume();
  } catch ({ status, message }) {
    if (status === 401) show("needs a key", "wrong");
    else show(status ? message.split(/[;\n]/)[0] : "cannot be reached", "wrong");
  }
}

/** Finds again what was being answered when the page was left. */
function resume() {
  for (const chat of chats.values()) {
    const index = chat.messages.findLastIndex(({ end }) => end === "running");
    if (index >= 0 && !runs.has(chat.id)) respond(chat, index);
  }
}

// ---- questions and answers -----------------------------------------------------------------------------------------

/** A question after the message `parent`: at the end, or in the place of another one. */
function ask(text, parent) {
  if (!chats.has(current.id)) {
    current.title = text.replace(/\s+/g, " ").slice(0, 80);
    chats.set(current.id, current);
    history.replaceState(null, "", `#${current.id}`);
  }
  answer(store.add(current, parent, { role: "user", content: text }));
}

/** To a question; in the place of an answer that has nothing in it, if there is one. */
function answer(question, empty) {
  if (empty === undefined) empty = store.add(current, question, newAnswer());
  else current.messages[empty] = { ...newAnswer(), key: current.messages[empty].key, parent: question };
  respond(current, empty);
  showMessages();
  follow(true);
  showList(current);
  say("Waiting for the answer");
}

async function respond(chat, index) {
  const before = store.path(chat, chat.messages[index].parent).map((i) => chat.messages[i]);
  const ticking = setInterval(draw, 100, chat), saving = setInterval(keep, 2000, chat);
  const running = run(chat, index, before, () => draw(chat));
  keep(chat);
  showRunning();
  look();
  await running;
  [ticking, saving].forEach(clearInterval);
  keep(chat);
  const { end, error } = chat.messages[index];
  say({ stop: "The answer is complete", stopped: "Stopped", error }[end] ?? "The answer was cut off");
  update(chat);
  showRunning();
  showContext();
  look();
  if (end !== "running") resume();
}

let frame;
function draw(chat) {
  if (chat !== current) return;
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => update(chat));
}

function update(chat) {
  if (chat !== current) return;
  views.at(-1)?.update?.();
  follow();
}

function keep(chat) {
  $("warning").hidden = store.save(chat, runs.get(chat.id)?.answer);
}

// ---- what is shown -------------------------------------------------------------------------------------------------

const does = {
  ask, typing: (area, form, send) => typing(area, form, (text) => runs.has(current.id) || send(text)),
  show(index) {
    store.show(current, index);
    keep(current);
    showMessages();
    const shown = views.find((view) => view.index === index);
    shown.node.querySelector(".version:enabled").focus();
    follow();
  },
  regenerate(index) {
    const { content, reasoning, parent } = current.messages[index];
    answer(parent, content || reasoning ? undefined : index);
  },
  answerNow: (index) => answerNow(current.messages[index]),
};

/** The shown branch. Views of messages that are shown already stay, unless there are more versions of them now. */
function showMessages() {
  const fresh = store.path(current).map((index) => {
    const message = current.messages[index], versions = store.siblings(current, index).length;
    const same = views.find((view) => view.message === message && view.versions === versions);
    const make = message.role === "user" ? questionView : answerView;
    return same ?? { index, message, versions, ...make(current, index, does) };
  });
  const n = fresh.findIndex((view, i) => view !== views[i]), changed = n < 0 ? fresh.length : n;
  [...$("messages").children].slice(changed).forEach((node) => node.remove());
  $("messages").append(...fresh.slice(changed).map(({ node }) => node));
  views = fresh;
  showRunning();
  showContext();
}

/** A chat, at a message of it or at its end. */
function open(id, at) {
  const kept = chats.get(id), place = kept?.messages[at] && Number(at);
  if (place >= 0) store.show(kept, place);
  if (!current || kept !== current) {
    views = [];
    current = kept ?? store.newChat();
    field.value = store.draft(kept ? id : "");
    field.dispatchEvent(new Event("input"));
  }
  document.body.classList.remove("listing");
  $("menu").ariaExpanded = "false";
  showMessages();
  showList(current);
  follow(true);
  const found = views.find(({ index }) => index === place);
  if (found) {
    sticks = false;
    found.node.scrollIntoView({ block: "start" });
  } else if (!coarse.matches) field.focus();
}

function showRunning() {
  const running = runs.has(current.id);
  $("messages").classList.toggle("running", running);
  $("welcome").hidden = current.messages.length > 0;
  $("send").hidden = running;
  $("stop").hidden = !running;
}

function showContext() {
  const used = current.messages[current.leaf]?.usage?.total_tokens;
  if (context) $("context").textContent = `${used ? `${grouped(used)} of ` : ""}${grouped(context)}`;
}

const log = document.querySelector("main");
let sticks = true; // the user is at the bottom and stays there

function follow(jump = false) {
  sticks ||= jump;
  if (sticks) log.scrollTop = log.scrollHeight;
}
log.onscroll = () => { sticks = log.scrollHeight - log.scrollTop - log.clientHeight < 16; };
onresize = () => follow();

// ---- what the user does --------------------------------------------------------------------------------------------

const field = document.querySelector("#composer textarea");
typing(field, $("composer"), (text) => {
  if (runs.has(current.id)) return;
  field.value = "";
  store.keepDraft(chats.has(current.id) ? current.id : "", "");
  field.dispatchEvent(new Event("input"));
  ask(text, current.leaf);
  field.focus();
});
field.addEventListener("input", () => {
  $("send").disabled = !field.value.trim();
  store.keepDraft(chats.has(current.id) ? current.id : "", field.value);
});
$("stop").onclick = () => { stop(current.id); field.focus(); };
$("messages").onclick = ({ target }) => {
  if (target.matches(".copy-code")) copy(target.closest("figure").querySelector("code").textContent, target);
};

onkeydown = (event) => {
  if (event.key === "k" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    showSide(true);
    $("search").select();
  }
  if (event.key !== "Escape" || $("settings").open) return;
  if (document.body.classList.contains("listing")) return showSide(false);
  if (document.activeElement === $("search")) return;
  const cancel = document.querySelector(".question .cancel");
  if (cancel) cancel.click();
  else stop(current.id);
};

/** The list of chats, which a narrow window shows over the chat. */
function showSide(shown) {
  const isNarrow = $("menu").checkVisibility();
  document.body.classList.toggle("listing", shown && isNarrow);
  $("menu").ariaExpanded = shown && isNarrow;
  if (isNarrow) (shown ? $("search") : $("menu")).focus();
}
$("menu").onclick = () => showSide(!document.body.classList.contains("listing"));
document.body.onclick = ({ target }) => { if (target === document.body) showSide(false); }; // beside the open list

function remove(gone) {
  if (!confirm(gone.length === 1 ? `Delete “${gone[0].title}”?` : `Delete all ${gone.length} chats?`)) return;
  for (const chat of gone) {
    store.forget(chat);
    discard(chat);
  }
  if (gone.includes(current)) location.hash = "";
  showList(current);
}
listen(remove, () => showList(current));
$("delete-all").onclick = () => remove([...chats.values()]);
$("export").onclick = () => {
  const json = JSON.stringify({ model: $("model").textContent, chats: [...chats.values()] }, null, 2);
  const href = URL.createObjectURL(new Blob([json], { type: "application/json" }));
  make("a", { href, download: `stepgguf-chats-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(URL.revokeObjectURL, 1000, href);
};

onKey(() => { context = null; look(); });
store.onOtherTab((id) => runs.has(id), (id) => {
  if (id === current.id) openHash();
  showList(current);
});

const openHash = () => open(...location.hash.slice(1).split("/"));
onhashchange = openHash;
onpagehide = () => runs.forEach(({ chat }) => keep(chat));
onfocus = look;
setInterval(() => document.hidden || look(), 30_000);
openHash();
look();
