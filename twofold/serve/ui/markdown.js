/* Blocks of Markdown: what structure an answer has, and the nodes that show it.

   Every piece of text that is shown is a slice of the source and is drawn by `leaf(start, end)`, so that the caller can
   lay tokens under it:

     source   **so** it is\n- one          blocks   paragraph [0, 12)   list [13, 18)
     leaf     ..[so].[ it is]...[one]

   A block depends on nothing after its own end but the next block's first line. While text is still arriving, all
   blocks but the last are therefore final, and only the last is drawn again.

   Left out on purpose: HTML (it stays text), images, and emphasis by underscores, which would eat __init__. */

import { copyButton } from "/ui/clipboard.js";
import { el } from "/ui/element.js";
import { inline } from "/ui/inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?(?!>)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DASHES = /^ *\|?(?: *:?-+:? *\|)+ *(?::?-+:? *)?$/;
const DOCTEST = /^ *>>> /;
const DEPTH = 8; // deeper quotes and lists are shown as text: a hostile answer must not exhaust the stack

/** The top-level blocks of `source` from index `from` on, each with its `start` in the source. */
export function parse(source, from = 0) {
  const lines = [];
  for (let start = from; start < source.length; ) {
    const newline = source.indexOf("\n", start);
    const end = newline < 0 ? source.length : newline;
    lines.push({ start, end });
    start = end + 1;
  }
  return blocks(source, lines, 0);
}

/** The node of one block; `leaf(start, end)` gives the nodes of a slice of the source. */
export function draw(source, block, leaf) {
  return DRAW[block.kind](source, block, leaf);
}

function blocks(source, lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    const text = slice(source, lines[at]);
    if (!text.trim()) {
      at += 1;
      continue;
    }
    const read = READERS.find((reader) => reader.starts(text, lines, at, source, depth)).read;
    const { next, ...block } = read(source, lines, at, depth);
    found.push({ start: lines[at].start, ...block });
    at = next;
  }
  return found;
}

/* In order of precedence; the last takes any line. */
const READERS = [
  { starts: (text) => FENCE.test(text), read: readFence },
  { starts: (text) => DOCTEST.test(text), read: readDoctest },
  { starts: (text) => HEADING.test(text), read: readHeading },
  { starts: (text) => RULE.test(text), read: (source, lines, at) => ({ kind: "rule", next: at + 1 }) },
  { starts: (text, lines, at, source) => tableStarts(text, lines, at, source), read: readTable },
  { starts: (text, lines, at, source, depth) => depth < DEPTH && QUOTE.test(text), read: readQuote },
  { starts: (text, lines, at, source, depth) => depth < DEPTH && ITEM.test(text), read: readList },
  { starts: () => true, read: readParagraph },
];

function interrupts(text) {
  const item = ITEM.exec(text);
  return (
    !text.trim() || FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text) || DOCTEST.test(text) ||
    (item !== null && (item[2].length === 1 || /^1[.)]/.test(item[2])))
  );
}

function readFence(source, lines, at) {
  const [, indent, mark, lang] = FENCE.exec(slice(source, lines[at]));
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
  const code = [];
  let next = at + 1;
  while (next < lines.length && !closing.test(slice(source, lines[next]))) {
    code.push(strip(source, lines[next], indent.length));
    next += 1;
  }
  return { kind: "code", lang, lines: code, next: next + 1 };
}

function readDoctest(source, lines, at) {
  let next = at;
  while (next < lines.length && slice(source, lines[next]).trim()) next += 1;
  return { kind: "code", lang: "python", lines: lines.slice(at, next), next };
}

function readHeading(source, lines, at) {
  const text = slice(source, lines[at]);
  const [, marks, words] = HEADING.exec(text);
  const start = lines[at].start + (words ? text.indexOf(words, text.indexOf(marks) + marks.length) : 0);
  return { kind: "heading", level: marks.length, lines: [{ start, end: start + words.length }], next: at + 1 };
}

function readQuote(source, lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const text = slice(source, lines[next]);
    const mark = QUOTE.exec(text);
    if (!mark && (interrupts(text) || !inner.length)) break;
    inner.push({ start: lines[next].start + (mark ? mark[0].length : 0), end: lines[next].end });
  }
  return { kind: "quote", blocks: blocks(source, inner, depth + 1), next };
}

/* An item owns what is indented under it, and the lines that run on without a blank line between. */
function readList(source, lines, at, depth) {
  const first = ITEM.exec(slice(source, lines[at]));
  const ordered = first[2].length > 1;
  const items = [];
  let next = at;
  while (next < lines.length) {
    const mark = ITEM.exec(slice(source, lines[next]));
    if (!mark || (mark[2].length > 1) !== ordered || mark[1].length > first[1].length + 1) break;
    const owned = [{ start: lines[next].start + mark[0].length, end: lines[next].end }];
    const width = mark[1].length + mark[2].length + 1;
    for (next += 1; next < lines.length; next += 1) {
      const text = slice(source, lines[next]);
      const under = !text.trim() || text.search(/\S/) > mark[1].length + 1;
      const blankBefore = !slice(source, lines[next - 1]).trim();
      if (!under && (blankBefore || interrupts(text) || ITEM.test(text))) break;
      owned.push(strip(source, lines[next], width));
    }
    items.push(blocks(source, owned, depth + 1));
  }
  return { kind: "list", ordered, first: ordered ? Number.parseInt(first[2], 10) : 1, items, next };
}

function tableStarts(text, lines, at, source) {
  return text.includes("|") && at + 1 < lines.length && DASHES.test(slice(source, lines[at + 1]));
}

function readTable(source, lines, at) {
  const rows = [cells(source, lines[at])];
  let next = at + 2;
  for (; next < lines.length && slice(source, lines[next]).includes("|"); next += 1) rows.push(cells(source, lines[next]));
  return { kind: "table", rows, next };
}

function cells(source, line) {
  const found = [];
  let { start } = line;
  for (let index = line.start; index <= line.end; index += 1) {
    const border = index === line.end || (source[index] === "|" && source[index - 1] !== "\\");
    if (!border) continue;
    const outside = (index === line.end || found.length === 0) && !source.slice(start, index).trim();
    if (!(outside && (index === line.end || start === line.start))) found.push(trimmed(source, start, index));
    start = index + 1;
  }
  return found;
}

function readParagraph(source, lines, at) {
  let next = at + 1;
  while (next < lines.length && !interrupts(slice(source, lines[next]))) next += 1;
  return { kind: "paragraph", lines: lines.slice(at, next), next };
}

const DRAW = {
  paragraph: (source, block, leaf) => el("p", {}, inline(source, block.lines, leaf)),
  heading: (source, block, leaf) => el(`h${Math.min(block.level + 2, 6)}`, {}, inline(source, block.lines, leaf)),
  rule: () => el("hr"),
  quote: (source, block, leaf) => el("blockquote", {}, all(source, block.blocks, leaf)),
  list: (source, block, leaf) =>
    el(
      block.ordered ? "ol" : "ul",
      { start: block.first === 1 ? null : block.first },
      block.items.map((item) => el("li", {}, all(source, item, leaf))),
    ),
  table: (source, block, leaf) => {
    const row = (line, tag) => el("tr", {}, line.map((cell) => el(tag, {}, inline(source, [cell], leaf))));
    const [head, ...body] = block.rows;
    return el(
      "div",
      { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
      el("table", {}, el("thead", {}, row(head, "th")), el("tbody", {}, body.map((line) => row(line, "td")))),
    );
  },
  code: (source, block, leaf) => {
    const text = () => block.lines.map((line) => slice(source, line)).join("\n");
    const pieces = block.lines.flatMap((line, index) =>
      index + 1 < block.lines.length ? [...leaf(line.start, line.end), "\n"] : leaf(line.start, line.end),
    );
    return el(
      "figure",
      { class: "code" },
      el("figcaption", {}, el("span", {}, block.lang || "code"), copyButton("Copy this code", text)),
      el("pre", { tabindex: "0", "aria-label": `Code, ${block.lang || "plain"}` }, el("code", {}, pieces)),
    );
  },
};

function all(source, list, leaf) {
  return list.map((block) => draw(source, block, leaf));
}

function slice(source, { start, end }) {
  return source.slice(start, end);
}

function strip(source, line, width) {
  const indent = slice(source, line).search(/[^ ]|$/);
  return { start: line.start + Math.min(indent, width), end: line.end };
}

function trimmed(source, start, end) {
  const text = source.slice(start, end);
  const lead = text.search(/\S|$/);
  return { start: start + lead, end: start + Math.max(lead, text.trimEnd().length) };
}
