/* What the policy said at one step and what that was worth: each prompt once, its answers side by side under it.

     ◀ ──────●── ▶  step 40 of 60   ☑ newest       the slider leads back; `newest` follows the run, unless an answer is
     def add(a, b):                                being read: unfolded, or under the keyboard
     ┌ 1.5  ▲ +0.87 ┐ ┌ 0.1  ▼ −0.87 ┐
     │ return a + b │ │ return "..."  │
     └ 10 tokens    ┘ └ 48, cut off   ┘ */

import { ApiError, row as ask } from "/ui/api.js";
import { el } from "/ui/element.js";
import { count, number } from "/ui/series.js";

const KEPT = 24; // steps whose answers are remembered
const PATIENCE_MS = 8000;
const LINES = 12; // of a text before it is folded, and characters
const CHARACTERS = 800;
const DEEPEST = 12; // spaces of indentation
const ENDS = { stop: "ended by itself", length: "cut off at the limit", error: "failed" };
const signed = (value) => `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`;

/** Shows the rollouts of one of the `shown` runs in `root`, with `controls` for which, when and in what order. */
export class Rollouts {
  constructor(controls, root) {
    this.root = root;
    this.at = 0;
    this.known = new Map(); // "name version row": answers
    this.asking = null;
    this.drawn = "";
    const [change, input] = [() => this.render(), (event) => this.go(Number(event.target.value))];
    const button = (words, label, by) => el("button", { type: "button", class: "chip", "aria-label": label, on: { click: () => this.go(this.at + by) } }, words);
    this.run = el("select", { on: { change: () => this.go(Infinity) } });
    this.which = el("label", {}, "Run ", this.run);
    this.back = button("‹", "The step before", -1);
    this.slider = el("input", { type: "range", min: "0", step: "1", "aria-label": "Step", on: { input } });
    this.forth = button("›", "The step after", 1);
    this.now = el("span", { class: "when" });
    this.newest = el("input", { type: "checkbox", on: { change } });
    this.newest.checked = true;
    this.order = el("select", { on: { change } }, el("option", { value: "drawn" }, "as drawn"), el("option", { value: "best" }, "best first"));
    controls.append(this.which, el("span", { class: "steps" }, this.back, this.slider, this.forth, this.now), el("label", {}, this.newest, "Newest"), el("label", {}, "Order ", this.order));
  }

  /** `shown` is [{run, hue}]; whether there is anything to see. */
  show(shown) {
    this.shown = shown.filter(({ run }) => run.rollouts.length);
    if (this.shown.length) this.render();
    return this.shown.length > 0;
  }

  /* To the step of a number among those with rollouts; the last one is followed from then on. */
  go(at) {
    this.at = at;
    this.newest.checked = at >= this.chosen().run.rollouts.length - 1;
    this.render();
  }

  chosen() {
    return this.shown.find(({ run }) => run.name === this.run.value) ?? this.shown[0];
  }

  get reading() {
    return this.root.contains(document.activeElement) || this.root.querySelector('[aria-expanded="true"]') !== null;
  }

  render() {
    this.names();
    const { run } = this.chosen();
    const last = run.rollouts.length - 1;
    const stay = this.drawn.startsWith(`${run.name} ${run.version} `) && this.reading;
    if (this.newest.checked && !stay) this.at = last;
    this.at = Math.min(Math.max(this.at, 0), last);
    const { step, row } = run.rollouts[this.at];
    this.slider.max = String(last);
    this.slider.value = String(this.at);
    this.slider.setAttribute("aria-valuetext", `step ${count(step)}`);
    this.slider.hidden = this.back.hidden = this.forth.hidden = last === 0;
    this.back.disabled = this.at === 0;
    this.forth.disabled = this.at === last;
    this.now.textContent = `step ${count(step)} of ${count(run.rollouts[last].step)}`;
    this.load(run, row);
  }

  names() {
    const names = this.shown.map(({ run }) => run.name);
    const there = [...this.run.options].map((option) => option.value);
    if (names.join("\n") !== there.join("\n")) {
      const before = this.run.value;
      this.run.replaceChildren(...names.map((name) => el("option", { value: name, selected: name === before }, name)));
    }
    this.which.hidden = names.length < 2;
  }

  async load(run, row) {
    const key = `${run.name} ${run.version} ${row}`;
    const wanted = `${key} ${this.order.value}`;
    if (wanted === this.drawn || wanted === this.asking?.wanted) return;
    this.asking?.stop.abort();
    const stop = new AbortController();
    this.asking = { wanted, stop };
    this.root.setAttribute("aria-busy", "true");
    try {
      const answers = this.known.get(key) ?? (await ask(run.name, row, run.version, AbortSignal.any([stop.signal, AbortSignal.timeout(PATIENCE_MS)]))).rollouts;
      if (this.asking?.wanted !== wanted) return;
      this.remember(key, answers);
      this.root.replaceChildren(...groups(answers, this.order.value === "best"));
      this.drawn = wanted;
    } catch (error) {
      if (stop.signal.aborted) return;
      this.root.replaceChildren(el("p", { class: "lost" }, error instanceof ApiError ? error.message : "The server does not answer."));
      this.drawn = ""; // asked again at the next turn
      if (!(error instanceof ApiError) && error.name !== "TimeoutError") throw error;
    } finally {
      if (this.asking?.wanted === wanted) {
        this.asking = null;
        this.root.removeAttribute("aria-busy");
      }
    }
  }

  remember(key, answers) {
    this.known.delete(key);
    this.known.set(key, answers);
    if (this.known.size > KEPT) this.known.delete(this.known.keys().next().value);
  }
}

/* Answers to one prompt stand together; where every prompt has one alone, prompts stand side by side. */
function groups(answers, best) {
  const found = [];
  for (const answer of answers) {
    const last = found.at(-1);
    if (last && last[0].prompt === answer.prompt && last[0].group === answer.group) last.push(answer);
    else found.push([answer]);
  }
  const largest = Math.max(...answers.map(({ advantage }) => Math.abs(advantage ?? 0)), 1e-9);
  const alone = found.every((group) => group.length === 1);
  return [el("div", { class: alone ? "groups alone" : "groups" }, ...found.map((group) => article(group, largest, best)))];
}

function article(group, largest, best) {
  const rewards = group.map(({ reward }) => reward).filter((reward) => typeof reward === "number");
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
  const range = rewards.length ? `, reward ${number(mean)} on average, ${number(Math.min(...rewards))} to ${number(Math.max(...rewards))}` : "";
  const facts = group.length > 1 ? el("p", {}, `${count(group.length)} answers${range}`) : "";
  const order = best ? [...group].sort((one, other) => (other.reward ?? -Infinity) - (one.reward ?? -Infinity)) : group;
  const prompt = plain(group[0].prompt);
  return el("article", { class: "group" }, el("header", {}, folding(prompt, "prompt"), facts), el("ol", { class: "answers" }, ...order.map((answer) => card(answer, largest))));
}

function card({ reward, advantage, parts = {}, text, tokens, finish }, largest) {
  const value = typeof reward === "number" ? number(reward) : "no reward";
  const sign = Math.sign(Math.round(1e4 * (advantage ?? 0)));
  const mark = ["▼", "●", "▲"][sign + 1];
  const chip = typeof advantage === "number" ? el("span", { class: "advantage", title: "Advantage: how much better than expected" }, el("i", { "aria-hidden": "true" }, mark), el("span", { class: "hidden" }, "advantage "), sign ? signed(advantage) : "0") : "";
  const lean = el("i", { class: "lean", "aria-hidden": "true" });
  const node = el(
    "li",
    { class: "answer", data: { sign: ["less", "even", "more"][sign + 1] } },
    lean,
    el("header", {}, el("span", {}, el("small", {}, "reward "), el("b", {}, value)), chip),
    folding(plain(text), "text"),
    el(
      "footer",
      {},
      el("dl", {}, ...Object.entries(parts ?? {}).map(([name, part]) => el("div", {}, el("dt", {}, name), el("dd", {}, typeof part === "number" ? number(part) : "none")))),
      el("p", { class: finish === "stop" ? false : "cut" }, [typeof tokens === "number" ? `${count(tokens)} tokens` : "", ENDS[finish] ?? finish].filter(Boolean).join(", ")),
    ),
  );
  node.style.setProperty("--size", String(Math.min(Math.abs(advantage ?? 0) / largest, 1)));
  return node;
}

/* A text as it is, the rest of a long one behind a button. */
function folding(text, kind) {
  const lines = text.split("\n");
  const head = lines.slice(0, LINES).join("\n").slice(0, CHARACTERS);
  const pre = el("pre", {}, ...(text.trim() ? written(head) : ["(blank)"]));
  if (head.length >= text.trimEnd().length) return el("div", { class: kind }, pre);
  pre.classList.add("folded");
  const words = lines.length > LINES ? `Show all ${count(lines.length)} lines` : `Show all ${count(text.length)} characters`;
  const click = () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Show less" : words;
    pre.replaceChildren(...written(open ? text : head));
    pre.classList.toggle("folded", !open);
  };
  const button = el("button", { type: "button", class: "fold", "aria-expanded": "false", on: { click } }, words);
  return el("div", { class: kind }, pre, button);
}

/* Lines whose continuation, where the card is too narrow, stands a little behind their own beginning. They are boxes with
   true ends of lines between them, so that a copied text is the text. */
function written(text) {
  return text.trimEnd().split("\n").flatMap((line, index) => {
    const node = el("span", {}, line);
    node.style.setProperty("--indent", String(Math.min(/^ */.exec(line)[0].length, DEEPEST) + 2));
    return index ? ["\n", node] : [node];
  });
}

function plain(value) {
  return typeof value === "string" ? value : JSON.stringify(value ?? "");
}
