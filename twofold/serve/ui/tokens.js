/* Which tokens made which characters.

   The server streams text and tokens side by side. Text may lag (a half character, or words that may become a stop
   string, are held back), and some tokens leave no text at all. So tokens are matched to the text as it comes:

     tokens   [ Hel ][lo ][ \xe2\x82 ][ \xac ][<eos>]
     text       Hel   lo        €
     cells    [0,3) [3,6)     [6,7)                      the two halves of € share a cell, <eos> has none
*/

import { el } from "/ui/element.js";

/** The text of an answer cut into cells {start, end, tokens}, in order; a token is an entry of `logprobs.content`. */
export class Cells {
  constructor() {
    this.text = "";
    this.cells = [];
    this.count = 0;
    this.at = 0;
    this.queue = [];
  }

  /** Add text and tokens of one chunk; either may be empty. */
  push(text, tokens = []) {
    this.text += text;
    this.queue.push(...tokens);
    this.count += tokens.length;
    while (this.queue.length && this.match(false));
  }

  /** No more will come: a token of which a stop string left only a part is given that part. */
  finish() {
    while (this.queue.length && this.match(true));
  }

  /** Nodes of text[start, end): a span for each cell in it, plain text where no token is known. */
  nodes(start, end) {
    const nodes = [];
    for (let index = this.first(start), at = start; at < end; index += 1) {
      const cell = this.cells[index];
      if (!cell || cell.start >= end) {
        nodes.push(this.text.slice(at, end));
        break;
      }
      if (cell.start > at) nodes.push(this.text.slice(at, cell.start));
      const from = Math.max(at, cell.start);
      at = Math.min(end, cell.end);
      const span = el("span", { class: "token", data: { cell: index } }, this.text.slice(from, at));
      span.style.setProperty("--doubt", (1 - probability(cell)).toFixed(3));
      nodes.push(span);
    }
    return nodes;
  }

  /* One step of matching: true if the queue got shorter. */
  match(last) {
    const { taken, text } = decode(this.queue);
    if (!taken && !last) return false;
    const used = this.queue.slice(0, taken || this.queue.length);
    const rest = this.text.slice(this.at, this.at + text.length);
    const bare = text.trimStart();
    let width = 0;
    if (rest === text) width = text.length;
    else if (text.startsWith(rest)) {
      if (!last) return false; // the text lags behind: wait for it
      width = rest.length;
    } else if (bare && this.text.startsWith(bare, this.at)) width = bare.length; // a tokenizer that hides a first space
    if (width) this.cells.push({ start: this.at, end: this.at + width, tokens: used });
    this.at += width;
    this.queue.splice(0, used.length);
    return true;
  }

  /* The first cell that ends after `start`. */
  first(start) {
    let low = 0;
    let high = this.cells.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.cells[middle].end > start) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/** How likely the model held the tokens of a cell together, 0 to 1. */
export function probability(cell) {
  return Math.exp(Math.min(0, cell.tokens.reduce((sum, token) => sum + token.logprob, 0)));
}

/** A token's text with what cannot be seen made visible. */
export function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

const encoder = new TextEncoder();

/* The fewest tokens from the front that make whole characters: {taken: 0} if more are needed to tell. */
function decode(queue) {
  const bytes = [];
  for (let index = 0; index < Math.min(queue.length, 4); index += 1) {
    bytes.push(...(queue[index].bytes ?? encoder.encode(queue[index].token)));
    const whole = new Uint8Array(bytes);
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(whole, { stream: true });
    } catch {
      return { taken: index + 1, text: new TextDecoder("utf-8", { ignoreBOM: true }).decode(whole) };
    }
    if (encoder.encode(text).length === whole.length) return { taken: index + 1, text };
  }
  const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  return { taken: queue.length < 4 ? 0 : 4, text };
}
