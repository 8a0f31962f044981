// The chats in this browser's storage, one key each, and what is typed but not sent.
//
//     chat     id, created, title, messages, leaf
//     message  role, content, parent: the index of the message before it, -1 for none; key: what it is known by in
//              every tab; of an answer also what answers.js writes
//
// The messages of a chat are a tree, in the order in which they were written. `leaf` is the end of the branch that is
// shown. An edited question or a second answer is a sibling of the first; nothing is taken away. Two tabs may write the
// same chat at a time: whoever saves takes over first what the other has saved.

const CHAT = "stepgguf.chat.", DRAFT = "stepgguf.draft.";
const AROUND = 36; // characters shown before what was searched for

export const chats = new Map();

for (const name of Object.keys(localStorage).filter((name) => name.startsWith(CHAT))) {
  const chat = read(localStorage.getItem(name));
  if (chat) chats.set(chat.id, chat);
}

/** null if it is none. Older versions kept one branch and spelled the fields of an answer as the API did. */
function read(json) {
  try {
    const chat = JSON.parse(json);
    if (typeof chat.id !== "string" || typeof chat.title !== "string") return null;
    chat.messages.forEach((message, i) => {
      message.parent ??= i - 1;
      const { role, content, parent } = message;
      if (typeof content !== "string" || !Number.isInteger(parent) || parent < -1 || parent >= i) throw new TypeError();
      if (role === "user") return;
      if (role !== "assistant") throw new TypeError();
      message.reasoning ??= message.reasoning_content ?? "";
      message.at ??= Object.fromEntries(Object.entries(message.seconds ?? {}).map(([when, s]) => [when, 1000 * s]));
    });
    if (!(chat.leaf in chat.messages)) chat.leaf = chat.messages.length - 1;
    return chat;
  } catch {
    return null;
  }
}

export const newChat = () =>
  ({ id: Date.now().toString(36), created: new Date().toISOString(), title: "", messages: [], leaf: -1 });

const saved = new Map(); // chat id -> what this tab has saved

/** False if the browser stores no more. writing: the answer that this tab is writing, if it is. */
export function save(chat, writing) {
  if (!chats.has(chat.id)) return true; // it was deleted while it was answered
  const stored = localStorage.getItem(CHAT + chat.id);
  const other = stored && stored !== saved.get(chat.id) ? read(stored) : null;
  if (other) takeOver(chat, other, writing);
  try {
    saved.set(chat.id, JSON.stringify(chat));
    localStorage.setItem(CHAT + chat.id, saved.get(chat.id));
    return true;
  } catch {
    return false;
  }
}

/** Messages that only the other tab has, and what it knows more of the others. Those of before there were keys have the
 * same index in all tabs. */
function takeOver({ messages }, other, writing) {
  const known = new Map(messages.map(({ key }, i) => [key ?? i, i])), index = [];
  const progress = ({ content, reasoning = "", end }) => content.length + reasoning.length + (end !== "running");
  other.messages.forEach((theirs, i) => {
    const ours = messages[index[i] = known.get(theirs.key ?? i) ?? messages.length];
    if (!ours) messages.push({ ...theirs, parent: index[theirs.parent] ?? -1 });
    else if (ours !== writing && progress(theirs) > progress(ours)) Object.assign(ours, theirs, { parent: ours.parent });
  });
}

export function forget({ id, messages }) {
  chats.delete(id);
  localStorage.removeItem(CHAT + id);
  for (const place of [id, ...messages.map((_, i) => `${id}/${i}`)]) keepDraft(place, "");
}

/** Takes over what another tab did to a chat, unless this tab is busy with it, and tells its id. */
export function onOtherTab(isBusy, changed) {
  addEventListener("storage", ({ key, newValue }) => {
    const id = key?.startsWith(CHAT) ? key.slice(CHAT.length) : null, chat = newValue && read(newValue);
    if (id === null || isBusy(id)) return;
    if (chat) chats.set(id, chat);
    else chats.delete(id);
    changed(id);
  });
}

// ---- branches ------------------------------------------------------------------------------------------------------

/** The indices of the messages that are shown, or that lead to another one. */
export function path({ messages, leaf }, end = leaf) {
  const found = [];
  for (let i = end; i >= 0; i = messages[i].parent) found.unshift(i);
  return found;
}

const children = ({ messages }, parent) => messages.flatMap((message, i) => (message.parent === parent ? [i] : []));
export const siblings = (chat, i) => children(chat, chat.messages[i].parent);

/** Writes a message after another one; its index. */
export function add(chat, parent, message) {
  chat.leaf = chat.messages.push({ key: Math.random().toString(36).slice(2), ...message, parent }) - 1;
  return chat.leaf;
}

/** Shows the branch that goes through a message, at its newest end. */
export function show(chat, i) {
  for (chat.leaf = i; ;) {
    const next = children(chat, chat.leaf).at(-1);
    if (next === undefined) return;
    chat.leaf = next;
  }
}

// ---- drafts and search ---------------------------------------------------------------------------------------------

/** place: a chat's id, "" for a new one; with /INDEX a question of it that is edited. */
export const draft = (place) => localStorage.getItem(DRAFT + place) ?? "";

export function keepDraft(place, text) {
  try {
    if (text) localStorage.setItem(DRAFT + place, text);
    else localStorage.removeItem(DRAFT + place);
  } catch { /* the storage is full: save() says so */ }
}

export const newestFirst = () => [...chats.values()].sort((a, b) => (a.created < b.created ? 1 : -1));

/** The first place of each chat: {chat, index: of the message, -1 for the title, before, match, after}. */
export function search(words) {
  const wanted = words.toLowerCase();
  return newestFirst().flatMap((chat) => {
    const texts = [chat.title, ...chat.messages.map(({ content }) => content)];
    const i = texts.findLastIndex((text) => text.toLowerCase().includes(wanted));
    if (i < 0) return [];
    const text = texts[i].replace(/\s/g, " "), from = text.toLowerCase().indexOf(wanted), end = from + wanted.length;
    const before = (from > AROUND ? "…" : "") + text.slice(Math.max(0, from - AROUND), from);
    return [{ chat, index: i - 1, before, match: text.slice(from, end), after: text.slice(end, end + 80) }];
  });
}
