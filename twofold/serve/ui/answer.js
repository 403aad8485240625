/* One answer as it is written: its text, its tokens, its pace. */

import { el } from "/ui/element.js";
import { draw, parse } from "/ui/markdown.js";
import { reachable } from "/ui/popover.js";
import { Cells } from "/ui/tokens.js";

const ENDS = {
  length: "cut at the token limit",
  stopped: "stopped",
  timeout: "cut at the time limit",
  content_filter: "withheld",
};

const EMPTY = { stopped: "Stopped before the first word.", failed: "No answer." };

const FRAME_MS = 16;
const SHARE = 8; // pauses are this many times as long as drawing, for laying out costs as much again and more

/** Takes the chunks of a stream and shows them; `node` is what the page displays. */
export class Answer {
  constructor() {
    this.tokens = new Cells();
    this.body = el("div", { class: "body prose" });
    this.meta = el("p", { class: "meta" });
    this.tools = el("div", { class: "tools" });
    this.node = el("div", { class: "answer", "aria-busy": "true" }, this.body, el("div", { class: "foot" }, this.meta, this.tools));
    this.body.append(el("span", { class: "thinking", "aria-hidden": "true" }, el("i"), el("i"), el("i")));
    this.sent = performance.now();
    this.first = null;
    this.last = null;
    this.usage = null;
    this.end = null;
    this.fold = null;
    this.kept = 0; // blocks that are final, and where the text after them starts
    this.tail = 0;
    this.timer = 0;
    this.cost = 0;
  }

  get text() {
    return this.tokens.text;
  }

  get count() {
    return this.usage?.completion_tokens ?? this.tokens.count;
  }

  /** Tokens in a second after the first one, null while there are fewer than two. */
  get pace() {
    return this.count > 1 && this.last > this.first ? ((this.count - 1) * 1000) / (this.last - this.first) : null;
  }

  /** One chunk of the stream: text, tokens, the reason to end, the usage, or some of them. */
  push({ choices = [], usage = null }) {
    this.usage = usage ?? this.usage;
    const [choice] = choices;
    if (!choice) return;
    const tokens = choice.logprobs?.content ?? [];
    const text = choice.delta?.content ?? "";
    const thought = choice.delta?.reasoning_content ?? "";
    if (text || thought || tokens.length) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (thought) this.think(thought);
    else if (text && !this.text && this.fold) this.fold.open = false;
    this.tokens.push(text, thought ? [] : tokens);
    this.end = choice.finish_reason ?? this.end;
    // one very long block is drawn again and again: the longer that takes, the longer the pause
    this.timer ||= setTimeout(() => this.render(), Math.max(FRAME_MS, SHARE * this.cost));
  }

  /** Reasoning stands above the answer, and folds once that begins. */
  think(text) {
    if (!this.fold) {
      this.fold = el("details", { class: "thoughts", open: true }, el("summary", {}, "Reasoning"), el("p"));
      this.node.prepend(this.fold);
    }
    this.fold.lastChild.append(text);
  }

  /** The stream is over; `end` overrides the reason that the server gave. */
  finish(end = this.end) {
    this.end = end;
    this.tokens.finish();
    this.render();
    reachable(this.body);
    this.node.setAttribute("aria-busy", "false");
    if (!this.text) this.body.replaceChildren(el("p", { class: "nothing" }, EMPTY[end] ?? "The model ended without a word."));
  }

  /* Draw again from the first block that may still change. */
  render() {
    clearTimeout(this.timer);
    this.timer = 0;
    const begun = performance.now();
    const source = this.text;
    if (source) {
      const blocks = parse(source, this.tail);
      const leaf = (start, end) => this.tokens.nodes(start, end);
      while (this.body.childNodes.length > this.kept) this.body.lastChild.remove();
      this.body.append(...blocks.map((block) => draw(source, block, leaf)));
      if (blocks.length > 1) {
        this.kept += blocks.length - 1;
        this.tail = blocks.at(-1).start;
      }
    }
    this.meta.replaceChildren(...this.facts().map((fact) => el("span", { class: fact[0] }, fact[1])));
    this.cost = performance.now() - begun;
  }

  facts() {
    const facts = [];
    if (this.pace) facts.push(["pace", `${this.pace.toFixed(this.pace < 100 ? 1 : 0)} tokens/s`]);
    if (this.first) facts.push(["first", `first token ${duration(this.first - this.sent)}`]);
    if (this.count) facts.push(["count", `${this.count} token${this.count === 1 ? "" : "s"}`]);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (this.usage) facts.push(["asked", `prompt ${this.usage.prompt_tokens}${cached ? `, ${cached} cached` : ""}`]);
    if (ENDS[this.end]) facts.push(["end", ENDS[this.end]]);
    return facts;
  }
}

function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}
