/* What the model thought of one token: shown on hover, on tap, and on focus with the arrow keys.

   An answer's tokens are one stop of the Tab key, not hundreds: the first carries tabindex 0, the arrows move it. */

import { el } from "/ui/element.js";
import { probability, visible } from "/ui/tokens.js";

const GAP = 8;
const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

/** Shows a popover for the tokens under `root`; `find(span)` gives the cell of a token's span. */
export class Popover {
  constructor(root, node, find) {
    this.node = node;
    this.find = find;
    this.anchor = null;
    const over = (event) => this.show(event.target.closest?.(".token"));
    root.addEventListener("pointerover", over);
    root.addEventListener("pointerdown", over);
    root.addEventListener("pointerleave", () => this.hide());
    root.addEventListener("focusin", over);
    root.addEventListener("focusout", () => this.hide());
    root.addEventListener("keydown", (event) => this.move(event));
    root.addEventListener("scroll", () => this.hide(), { capture: true, passive: true });
    addEventListener("resize", () => this.hide());
  }

  /** Whether it is open; Esc then closes it before anything else. */
  get open() {
    return !this.node.hidden;
  }

  show(span) {
    if (span === this.anchor && this.open) return;
    this.hide();
    const cell = span && this.find(span);
    if (!cell) return;
    this.node.replaceChildren(...cell.tokens.map(table));
    this.node.hidden = false;
    this.anchor = span;
    span.classList.add("shown");
    span.setAttribute("aria-describedby", this.node.id);
    this.place(span.getClientRects()[0] ?? span.getBoundingClientRect());
  }

  hide() {
    this.node.hidden = true;
    this.anchor?.classList.remove("shown");
    this.anchor?.removeAttribute("aria-describedby");
    this.anchor = null;
  }

  /** The text was drawn anew: a popover whose token is gone goes with it. */
  settle() {
    if (this.anchor && !this.anchor.isConnected) this.hide();
  }

  /* Under the token, or over it where there is no room. */
  place(rect) {
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const below = rect.bottom + GAP + height <= innerHeight;
    const top = below ? rect.bottom + GAP : Math.max(GAP, rect.top - GAP - height);
    const left = Math.min(Math.max(GAP, rect.left - 12), innerWidth - width - GAP);
    this.node.style.setProperty("top", `${top}px`);
    this.node.style.setProperty("left", `${left}px`);
  }

  move(event) {
    const from = event.target.closest?.(".token");
    if (!from || event.altKey || event.ctrlKey || event.metaKey) return;
    const spans = [...from.closest(".body").querySelectorAll(".token")];
    const last = spans.length - 1;
    const to = { Home: 0, End: last }[event.key] ?? spans.indexOf(from) + (MOVES[event.key] ?? 0);
    if (!(event.key in MOVES) && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    const next = spans[Math.min(Math.max(to, 0), last)];
    from.tabIndex = -1;
    next.tabIndex = 0;
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
    this.show(next); // scrolling hid it
  }
}

/** Make the tokens of a finished answer reachable by Tab. */
export function reachable(body) {
  const [first, ...others] = body.querySelectorAll(".token");
  for (const span of others) span.tabIndex = -1;
  if (first) first.tabIndex = 0;
}

/* The chosen token and its rivals, the likeliest first; the chosen one is added if it is not among them. */
function table(token) {
  const rivals = [...(token.top_logprobs ?? [])];
  if (!rivals.some((rival) => rival.token === token.token)) rivals.push(token);
  rivals.sort((one, other) => other.logprob - one.logprob);
  const head = el(
    "p",
    { class: "chosen" },
    el("code", {}, visible(token.token)),
    el("span", {}, percent(token)),
    el("small", {}, `log ${token.logprob.toFixed(3)}`),
  );
  const rows = rivals.map((rival) => {
    const bar = el("i", { class: "bar" });
    bar.style.setProperty("--share", probability({ tokens: [rival] }).toFixed(4));
    const chosen = rival.token === token.token;
    return el("li", { class: chosen ? "is-chosen" : null }, el("code", {}, visible(rival.token)), el("span", {}, percent(rival)), bar);
  });
  return el("div", { class: "thought" }, head, el("ol", {}, rows));
}

function percent(token) {
  const share = 100 * probability({ tokens: [token] });
  if (share < 0.01) return "<0.01%";
  return `${share.toFixed(share < 10 ? 2 : 1)}%`;
}
