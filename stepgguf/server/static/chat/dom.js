// Elements, numbers in words, and changing what is shown without making it anew.

export const $ = (id) => document.getElementById(id);

export const make = (tag, fields = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...children);
  return element;
};
export const button = (text, kind, onclick, fields = {}) =>
  make("button", { type: "button", className: `quiet ${kind}`, onclick, ...fields }, text);

export const grouped = (n) => n.toLocaleString("en");
export const counted = (n, word) => `${grouped(n)} ${word}${n === 1 ? "" : "s"}`;
export const rate = (n) => `${n < 100 ? n.toFixed(1) : grouped(Math.round(n))} tokens/s`;

/** ms since 1970, in fractions, and never going back while the page is open. */
export const clock = () => performance.timeOrigin + performance.now();

/** For screen readers. */
export const say = (text) => { $("spoken").textContent = text; };

/** Make `node` show these sources, each with a key. What it shows already is not touched, so selections stay. */
export function showAll(node, sources, render) {
  const shown = (node.shown ??= []);
  sources.forEach((source, i) => {
    if (shown[i] === source.key) return;
    shown[i] = source.key;
    if (i < node.childNodes.length) patch(node.childNodes[i], render(source));
    else node.append(render(source));
  });
  while (node.childNodes.length > sources.length) node.lastChild.remove();
  shown.length = sources.length;
}

function patch(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.data.length));
    else old.data = fresh.data;
  } else if (!old.cloneNode().isEqualNode(fresh.cloneNode())) old.replaceWith(fresh);
  else {
    const mine = [...old.childNodes], theirs = [...fresh.childNodes];
    theirs.forEach((child, i) => (i < mine.length ? patch(mine[i], child) : old.append(child)));
    mine.slice(theirs.length).forEach((child) => child.remove());
  }
}

export async function copy(text, pressed) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else { // a page over plain HTTP from another machine has none
    const area = make("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say("Copied");
  pressed.textContent = "Copied";
  setTimeout(() => { pressed.textContent = "Copy"; }, 1200);
}
