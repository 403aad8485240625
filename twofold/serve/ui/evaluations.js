/* What `twofold evaluate` found of the runs: each figure on a line from nothing to all, with the interval around it. */

import { el } from "/ui/element.js";
import { count, number, percent } from "/ui/series.js";

/** Shows the evaluations of `shown` runs, [{run, hue}], in `root`, task by task. */
export class Evaluations {
  constructor(root) {
    this.root = root;
    this.drawn = "";
  }

  /** Whether there is anything to see. */
  show(shown) {
    const found = shown.flatMap(({ run, hue }) => (run.summary.evaluations ?? []).map((one) => ({ ...one, hue, name: run.name })));
    const now = JSON.stringify([found, shown.length]);
    if (now !== this.drawn) {
      const tasks = [...new Set(found.map((one) => one.task))];
      this.root.replaceChildren(...tasks.map((task) => card(task, found.filter((one) => one.task === task), shown.length > 1)));
    }
    this.drawn = now;
    return found.length > 0;
  }
}

function card(task, found, named) {
  return el("article", { class: "task" }, el("h3", {}, task), ...found.map((one) => table(one, named)));
}

function table({ name, hue, prompts, samples, greedy, "pass@k": at = {}, reward = {}, settings = {} }, named) {
  const drawn = samples ? `, ${count(samples)} samples each at temperature ${number(settings.temperature ?? 1)}` : "";
  const rows = [
    line("greedy", greedy, true),
    ...Object.entries(at).map(([k, figure]) => line(`pass@${k}`, figure, true)),
    ...Object.entries(reward).map(([kind, figure]) => line(`reward, ${kind}`, figure, false)),
  ];
  const caption = [named ? `${name}: ` : "", `${count(prompts ?? 0)} prompts${drawn}`];
  const head = el("tr", { class: "hidden" }, ...["Figure", "Where it lies", "Value", "Interval"].map((word) => el("th", { scope: "col" }, word)));
  return el("table", { class: `measures hue-${hue}` }, el("caption", {}, named ? el("i", { class: "swatch" }) : "", ...caption), el("thead", {}, head), el("tbody", {}, ...rows));
}

function line(label, figure, share) {
  const { value, low, high } = figure ?? {};
  if (![value, low, high].every(Number.isFinite)) return "";
  const say = share ? percent : number;
  const track = el("i", { class: "track", "aria-hidden": "true" });
  track.hidden = !share && (low < 0 || high > 1); // a reward has no ends to draw it between
  for (const [name, at] of Object.entries({ value, low, high })) track.style.setProperty(`--${name}`, `${100 * at}%`);
  return el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, track), el("td", {}, say(value)), el("td", {}, `${say(low)} to ${say(high)}`));
}
