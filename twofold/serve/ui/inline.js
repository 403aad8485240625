/* Markdown inside a paragraph: code, emphasis, links. Linear in the length of the text, whatever a model writes. */

import { el } from "/ui/element.js";

const MARK = /\\[!-/:-@[-`{-~]|`+|\*{1,2}|~~|\[|https?:\/\/[^\s<>()]*[^\s<>().,;:!?'"*]/g;
const TARGET = /^\]\(\s*(\S+?)\s*\)/;
const TAGS = { "**": "strong", "*": "em", "~~": "del" };
const DEPTH = 6;

/** The nodes of a run of lines, each {start, end} in the source; `leaf(start, end)` draws a slice of the source. */
export function inline(source, lines, leaf) {
  return new Run(source, lines, leaf).nodes(0, Infinity, 0);
}

/* The lines are laid end to end in `text`; `origin` takes an index there back to the source. */
class Run {
  constructor(source, lines, leaf) {
    this.leaf = leaf;
    this.text = "";
    this.pieces = [];
    for (const [index, line] of lines.entries()) {
      const end = line.end + (index + 1 < lines.length ? 1 : 0); // with its newline
      this.pieces.push({ at: this.text.length, start: line.start, end });
      this.text += source.slice(line.start, end);
    }
    this.barren = new Map(); // mark -> from here on nothing closes it, so no later opener need look again
  }

  nodes(from, to, depth) {
    const nodes = [];
    const end = Math.min(to, this.text.length);
    let plain = from;
    let at = from;
    const emit = (until) => nodes.push(...this.slice(plain, until));
    while (at < end) {
      MARK.lastIndex = at;
      const found = MARK.exec(this.text);
      if (!found || found.index >= end) break;
      const piece = this.special(found[0], found.index, end, depth);
      if (piece) {
        emit(found.index);
        nodes.push(...piece.nodes);
        plain = at = piece.next;
      } else {
        at = found.index + found[0].length;
      }
    }
    emit(end);
    return nodes;
  }

  special(mark, at, end, depth) {
    const after = at + mark.length;
    if (mark[0] === "\\") return { nodes: this.slice(at + 1, after), next: after };
    if (mark[0] === "`") return this.code(mark, at, end);
    if (mark[0] === "[") return depth < DEPTH ? this.link(at, end, depth) : null;
    if (mark[0] === "h") return this.bare(mark, at, end);
    return depth < DEPTH ? this.emphasis(mark, at, end, depth) : null;
  }

  code(mark, at, end) {
    const from = at + mark.length;
    const close = this.closing(mark, from, end, (index) => this.text[index - 1] !== "`" && this.text[index + mark.length] !== "`");
    return close < 0 ? null : { nodes: [el("code", {}, this.slice(from, close))], next: close + mark.length };
  }

  /* An opener has a word after it and none before; a closer the reverse. 2*3*4 and **kwargs stay as they are. */
  emphasis(mark, at, end, depth) {
    const from = at + mark.length;
    if (/[\s*]/.test(this.text[from] ?? " ") || /\w/.test(this.text[at - 1] ?? " ")) return null;
    const close = this.closing(
      mark,
      from + 1,
      end,
      (index) =>
        /[^\s*]/.test(this.text[index - 1]) && !/\w/.test(this.text[index + mark.length] ?? " ") &&
        (mark !== "*" || this.text[index + 1] !== "*"),
    );
    if (close < 0) return null;
    return { nodes: [el(TAGS[mark], {}, this.nodes(from, close, depth + 1))], next: close + mark.length };
  }

  closing(mark, from, end, fits) {
    const key = `${mark} ${end}`;
    if (from >= (this.barren.get(key) ?? Infinity)) return -1;
    for (let at = this.text.indexOf(mark, from); at >= 0 && at < end; at = this.text.indexOf(mark, at + 1)) {
      if (fits(at)) return at;
    }
    this.barren.set(key, from);
    return -1;
  }

  link(at, end, depth) {
    const close = this.text.indexOf("](", at);
    if (close < 0 || close >= end || close - at > 300) return null;
    const target = TARGET.exec(this.text.slice(close, close + 2000));
    if (!target || !safe(target[1])) return null;
    return { nodes: [anchor(target[1], this.nodes(at + 1, close, depth + 1))], next: close + target[0].length };
  }

  bare(url, at, end) {
    if (at + url.length > end || !safe(url)) return null;
    return { nodes: [anchor(url, this.slice(at, at + url.length))], next: at + url.length };
  }

  /* The nodes of text[from, to): one leaf for each piece of the source it comes from. */
  slice(from, to) {
    const nodes = [];
    for (const { at, start, end } of this.pieces) {
      const low = Math.max(from, at);
      const high = Math.min(to, at + end - start);
      if (low < high) nodes.push(...this.leaf(start + low - at, start + high - at));
    }
    return nodes;
  }
}

/* No javascript:, no data:, nothing relative to this page. */
function safe(url) {
  return /^(https?:\/\/|mailto:)/i.test(url) && URL.canParse(url);
}

function anchor(href, nodes) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, nodes);
}
