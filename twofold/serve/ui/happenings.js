/* The list of events: the newest first, and a button for each kind that takes it away or brings it back. */

import { el } from "/ui/element.js";
import { KINDS } from "/ui/events.js";
import { count } from "/ui/series.js";

const MOST = 300;

/** Events of the runs that are shown, in `list`, their kinds in `kinds`. */
export class Happenings {
  constructor(kinds, list) {
    this.kinds = kinds;
    this.list = list;
    this.hidden = new Set();
    this.drawn = "";
  }

  /** `shown` is [{run, hue}]; whether there is anything to see. */
  show(shown) {
    const found = shown.flatMap(({ run, hue }) => run.events.all(run.summary.checkpoints).map((event) => ({ ...event, hue, name: run.name })));
    found.sort((one, other) => other.step - one.step || other.time - one.time);
    const now = JSON.stringify([found.length, found[0], [...this.hidden], shown.map(({ run, hue }) => [run.name, run.version, hue, run.summary.checkpoints])]);
    if (now !== this.drawn) this.draw(found, shown);
    this.drawn = now;
    return found.length > 0;
  }

  draw(found, shown) {
    const kept = found.filter((event) => !this.hidden.has(event.kind));
    const items = kept.slice(0, MOST).map((event) => item(event, shown.length > 1));
    if (kept.length > items.length) items.push(el("li", { class: "event" }, `and ${count(kept.length - items.length)} earlier`));
    this.list.replaceChildren(...items);
    const focused = document.activeElement?.dataset.kind;
    const present = Object.keys(KINDS).filter((kind) => found.some((event) => event.kind === kind));
    this.kinds.replaceChildren(...present.map((kind) => this.chip(kind, found.filter((event) => event.kind === kind).length, shown)));
    if (focused) this.kinds.querySelector(`[data-kind="${focused}"]`)?.focus();
  }

  chip(kind, many, shown) {
    const click = () => {
      if (!this.hidden.delete(kind)) this.hidden.add(kind);
      this.show(shown);
    };
    return el("button", { type: "button", class: "chip", "aria-pressed": String(!this.hidden.has(kind)), data: { kind }, on: { click } }, KINDS[kind], el("small", {}, count(many)));
  }
}

function item({ step, time, kind, words, hue, name }, named) {
  const run = named ? [el("i", { class: "swatch" }), el("small", {}, name)] : [];
  return el("li", { class: `event hue-${hue}`, data: { kind } }, el("b", {}, `step ${count(step)}`), el("span", {}, ...run, words), time ? clock(new Date(1000 * time)) : "");
}

function clock(when) {
  const today = when.toDateString() === new Date().toDateString();
  const day = today ? "" : `${when.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} `;
  return el("time", { datetime: when.toISOString() }, day + when.toLocaleTimeString("en-GB"));
}
