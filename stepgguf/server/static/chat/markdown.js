// Markdown, as models write it, to nodes. markdown-it reads it; nothing here makes or parses HTML.
//
//     text -blocks()-> [{key, tokens}] -rendered()-> nodes; what was written becomes text nodes
//
// Where CommonMark would take a visible character away or put another in its place, it stays: tags, entities, images,
// link definitions, a backslash before anything but a Markdown mark, cells beyond a table's head. A single * inside a
// word is a star (2*3*4). Chinese and Japanese have no spaces, so their characters are borders of ** as spaces are.

import markdownit from "../vendor/markdown-it/markdown-it.esm.min.mjs";
import { button, make } from "./dom.js";
import { FORMULA, formula } from "./formula.js";
import { highlighted } from "./syntax.js";

const DEEPEST = 40; // tokens in each other; what lies deeper is plain text
const LONGEST = 20_000; // characters of a paragraph that is searched for marks
const MOST_LINES = 100; // of a formula
const md = markdownit({ linkify: true }).disable(["reference", "entity", "image", "autolink", "lheading"]);
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
md.validateLink = (url) => /^https?:/i.test(url);
md.normalizeLinkText = (url) => url;

// ---- rules of our own ----------------------------------------------------------------------------------------------

const tokenize = md.block.tokenize;
md.block.tokenize = (state, start, end) => {
  if (state.level < DEEPEST) return tokenize.call(md.block, state, start, end);
  state.push("paragraph_open", "p", 1).map = [start, end];
  inlineToken(state, state.getLines(start, end, 0, false).trim());
  state.push("paragraph_close", "p", -1);
  state.line = end;
};

function inlineToken(state, content) {
  const token = state.push("inline", "", 0);
  token.content = content;
  token.children = [];
}

const lineAt = (state, i) => state.getLines(i, i + 1, state.blkIndent, false).trim();
const belongs = (state, i, end) => i < end && state.sCount[i] >= state.blkIndent && !state.isEmpty(i);

function mathBlock(state, start, end, silent) {
  const mark = /^(?:\$\$|\\\[)/.exec(lineAt(state, start))?.[0], close = mark === "$$" ? "$$" : "\\]";
  if (!mark) return false;
  const ends = (i) => lineAt(state, i).slice(i === start ? 2 : 0).includes(close);
  let last = start;
  const most = Math.min(end, start + MOST_LINES) - 1;
  while (!ends(last) && last < most && state.sCount[last + 1] >= state.blkIndent) last++;
  if (!ends(last) ? !state.env.open : !lineAt(state, last).endsWith(close)) return false;
  if (silent) return true;
  const token = state.push("math_block", "", 0);
  token.content = state.getLines(start, last + 1, state.blkIndent, false).trim();
  token.map = [start, last + 1];
  state.line = last + 1;
  return true;
}

const DELIMITERS = /^\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;
const CELLS = /((?:\\\||(`+)(?!`)[^`]*\2(?!`)|[^|])*)\|/g; // a bar in a code span or behind a backslash is text

function cellsOf(line) {
  const inner = line.replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return [...`${inner} |`.matchAll(CELLS)].map(([, cell]) => cell.trim().replaceAll("\\|", "|"));
}

function table(state, start, end, silent) {
  if (!lineAt(state, start).includes("|") || !belongs(state, start + 1, end)) return false;
  if (!DELIMITERS.test(lineAt(state, start + 1))) return false;
  if (silent) return true;
  const alignOf = (cell) => (!cell.endsWith(":") ? "" : cell.startsWith(":") ? "center" : "right");
  const aligns = cellsOf(lineAt(state, start + 1)).map(alignOf);
  const row = (i, tag) => {
    state.push("tr_open", "tr", 1);
    cellsOf(lineAt(state, i)).forEach((cell, column) => {
      state.push(`${tag}_open`, tag, 1).meta = aligns[column];
      inlineToken(state, cell);
      state.push(`${tag}_close`, tag, -1);
    });
    state.push("tr_close", "tr", -1);
  };
  const open = state.push("table_open", "table", 1);
  state.push("thead_open", "thead", 1);
  row(start, "th");
  state.push("thead_close", "thead", -1);
  state.push("tbody_open", "tbody", 1);
  let line = start + 2;
  for (; belongs(state, line, end) && lineAt(state, line).includes("|"); line++) row(line, "td");
  state.push("tbody_close", "tbody", -1);
  state.push("table_close", "table", -1);
  open.map = [start, line];
  state.line = line;
  return true;
}

function math(state, silent) {
  FORMULA.lastIndex = state.pos;
  const found = FORMULA.exec(state.src)?.[0];
  if (!found || state.pos + found.length > state.posMax) return false;
  if (!silent) state.push("math_inline", "", 0).content = found;
  state.pos += found.length;
  return true;
}

function escape(state, silent) {
  if (state.src[state.pos] !== "\\" || !/[*_`#~|$!<>+.-]/.test(state.src[state.pos + 1] ?? "")) return false;
  if (!silent) state.pending += state.src[state.pos + 1];
  state.pos += 2;
  return true;
}

md.block.ruler.at("table", table, { alt: ["paragraph"] });
md.block.ruler.before("fence", "math_block", mathBlock, { alt: ["paragraph", "blockquote", "list"] });
md.inline.ruler.before("escape", "math", math);
md.inline.ruler.at("escape", escape);

const SPACE = /^\s$/, MARK = /^[\p{P}\p{S}]$/u;
const WIDE = /^[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\u3000-\u303f\uff00-\uffef]$/u;

md.inline.State.prototype.scanDelims = function (start, splits) {
  let end = start;
  while (this.src[end] === this.src[start] && end < this.posMax) end++;
  const before = [...this.src.slice(Math.max(0, start - 2), start)].at(-1) ?? " ";
  const after = end < this.posMax ? String.fromCodePoint(this.src.codePointAt(end)) : " ";
  const [spaceBefore, spaceAfter] = [before, after].map((c) => SPACE.test(c));
  const [markBefore, markAfter] = [before, after].map((c) => MARK.test(c));
  const [wideBefore, wideAfter] = [before, after].map((c) => WIDE.test(c));
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore || wideBefore);
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter || wideAfter);
  const inside = splits && (end - start > 1 || wideBefore || wideAfter);
  return {
    can_open: left && (inside || !right || markBefore),
    can_close: right && (inside || !left || markAfter),
    length: end - start,
  };
};

// ---- tokens to nodes -----------------------------------------------------------------------------------------------

/** The blocks of a text. open: it goes on, so that its last block may change. */
export function blocks(text, open) {
  const source = text.replace(/\r\n?/g, "\n"), lines = source.split("\n"), tokens = [], found = [];
  md.block.parse(source, md, { open }, tokens);
  for (let from = 0, i = 0; i < tokens.length; i++) {
    if (tokens[i].level || tokens[i].nesting > 0) continue;
    const isOpen = open && i === tokens.length - 1, [first, end] = tokens[from].map;
    found.push({ key: `${isOpen}${lines.slice(first, end).join("\n")}`, tokens: tokens.slice(from, i + 1), isOpen });
    from = i + 1;
  }
  return found;
}

export function rendered({ tokens, isOpen }) {
  const last = isOpen ? tokens.findLast(({ type }) => type === "inline") : null, root = make("div");
  fill(root, tokens, (token) => {
    const words = [], { content } = token;
    if (content.length > LONGEST) return [{ type: "text", content }];
    md.inline.parse(token === last ? healed(content) : content, md, {}, words);
    return words;
  });
  return root.firstChild;
}

function fill(root, tokens, inside) {
  let at = root;
  for (const token of tokens) {
    if (token.type === "inline") fill(at, inside(token));
    else if (token.nesting < 0) at = at.parentNode;
    else {
      const node = (NODES[token.type] ?? (() => make(token.tag)))(token);
      if (token.type === "table_open") at.append(make("div", { className: "table" }, node)); // scrolls by itself
      else at.append(node);
      if (token.nesting > 0) at = node;
    }
    if (token.type === "table_close") at = at.parentNode;
  }
  root.normalize();
}

const cell = (token) => {
  const node = make(token.tag);
  if (token.meta) node.style.textAlign = token.meta;
  return node;
};
const NODES = {
  text: (token) => token.content,
  softbreak: () => "\n",
  hardbreak: () => "\n",
  code_inline: (token) => make("code", {}, token.content),
  math_inline: (token) => formula(token.content),
  math_block: (token) => formula(token.content),
  fence: (token) => codeBlock(token.content, token.info.trim()),
  code_block: (token) => codeBlock(token.content, ""),
  paragraph_open: (token) => make("p", token.hidden ? { className: "tight" } : {}),
  heading_open: (token) => make(`h${Math.min(Number(token.tag[1]) + 1, 6)}`),
  ordered_list_open: (token) =>
    make("ol", { start: Number(token.attrGet("start") ?? 1), ...(token.markup === ")" && { className: "round" }) }),
  th_open: cell,
  td_open: cell,
  link_open: (token) => make("a", { href: token.attrGet("href"), target: "_blank", rel: "noopener noreferrer" }),
};

function codeBlock(code, info) {
  return make("figure", {}, make("figcaption", {}, info || "text", button("Copy", "copy-code")),
    make("pre", { tabIndex: 0 }, highlighted(code.replace(/\n$/, ""), info.split(/[\s{]/)[0])));
}

/** A text that goes on, with the marks that are probably to come, so that words do not jump when they do. */
function healed(text) {
  const rest = text.replace(/(?<!`)(`+)(?!`)[\s\S]*?[^`]\1(?!`)/g, ""), ticks = /`+(?=[^`\s])/.exec(rest)?.[0];
  const parts = rest.split("**"), mark = ticks ?? (parts.length % 2 || !parts.at(-1).trim() ? "" : "**");
  return text.endsWith("\\") ? text : text.replace(/\s*$/, (space) => mark + space);
}
