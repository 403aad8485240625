/* The list of runs: which there are, how they stand, and which of them are shown. */

import { el } from "/ui/element.js";
import { count, duration } from "/ui/series.js";

/** Rows live as long as their run: one redrawn under the pointer would swallow a click. `toggle(name, alone)` is told. */
export class RunList {
  constructor(root, toggle) {
    this.root = root;
    this.toggle = toggle;
    this.rows = new Map();
  }

  /** Show these summaries in their order; `hues` is the colour of each run that is shown, `full` whether no more can be. */
  show(summaries, hues, full) {
    const names = summaries.map(({ name }) => name);
    for (const name of names.filter((name) => !this.rows.has(name))) this.rows.set(name, this.row(name));
    const nodes = names.map((name) => this.rows.get(name).node);
    if (nodes.length !== this.root.children.length || nodes.some((node, index) => node !== this.root.children[index])) this.root.replaceChildren(...nodes);
    for (const summary of summaries) this.update(this.rows.get(summary.name), summary, hues.get(summary.name), full);
  }

  row(name) {
    const box = el("input", { type: "checkbox", "aria-label": `Show ${name}`, on: { change: () => this.toggle(name, false) } });
    const state = el("span", { class: "state" });
    const done = el("span");
    const alone = el("button", { type: "button", title: "Show this run alone", on: { click: () => this.toggle(name, true) } }, el("b", {}, name), el("small", {}, state, done));
    return { node: el("li", { class: "run", data: { name } }, box, alone), box, state, done };
  }

  update({ node, box, state, done }, { state: now, step, steps, seconds }, hue, full) {
    const on = hue !== undefined;
    node.className = on ? `run hue-${hue}` : "run";
    box.checked = on;
    box.disabled = !on && full;
    state.dataset.state = state.textContent = now;
    const progress = steps ? `${count(step ?? 0)} / ${count(steps)}` : step === null ? "no rows yet" : `step ${count(step)}`;
    done.textContent = seconds === null ? progress : `${progress} · ${duration(seconds, 1)} ago`;
  }
}
