/* What the model answered to each prompt of the recipe, step beside step: the eye finds when it learnt. */

import { el } from "/ui/element.js";
import { count } from "/ui/series.js";

const MOST = 40; // of one prompt and run: as many as a reader will scroll through

/** Shows the samples of `shown` runs, [{run, hue}], in `root`; scrolled to the newest, unless the reader went back. */
export class Samples {
  constructor(root) {
    this.root = root;
    this.drawn = "";
  }

  show(shown) {
    const prompts = new Set(shown.flatMap(({ run }) => [...run.samples.keys()]));
    const now = JSON.stringify(shown.map(({ run, hue }) => [run.name, hue, run.version, [...run.samples.values()].map((some) => some.length)]));
    if (now === this.drawn) return;
    this.drawn = now;
    const before = new Map([...this.root.querySelectorAll(".strip")].map((strip) => [strip.dataset.key, strip]));
    this.root.replaceChildren(...[...prompts].map((prompt) => this.prompt(prompt, shown)));
    for (const strip of this.root.querySelectorAll(".strip")) {
      const old = before.get(strip.dataset.key);
      strip.scrollLeft = old && old.dataset.away === "true" ? Number(old.dataset.left) : strip.scrollWidth;
    }
  }

  prompt(prompt, shown) {
    const strips = shown.filter(({ run }) => run.samples.has(prompt)).map(({ run, hue }) => strip(prompt, run, hue, shown.length > 1));
    return el("article", { class: "prompt" }, el("h3", {}, el("code", {}, prompt)), ...strips);
  }
}

function strip(prompt, run, hue, named) {
  const cards = run.samples.get(prompt).slice(-MOST).map(({ step, text }) =>
    el("li", {}, el("h4", {}, `step ${count(step)}`), el("pre", {}, text.trim() ? text : "(blank)")),
  );
  const label = `Answers of ${run.name} by step`;
  const list = el("ol", { class: "strip", tabindex: "0", "aria-label": label, data: { key: `${run.name}\n${prompt}` } }, ...cards);
  list.addEventListener("scroll", () => {
    list.dataset.left = String(list.scrollLeft);
    list.dataset.away = String(list.scrollWidth - list.scrollLeft - list.clientWidth > 40);
  }, { passive: true });
  return named ? el("div", { class: `named hue-${hue}` }, el("p", {}, el("i", { class: "swatch" }), run.name), list) : list;
}
