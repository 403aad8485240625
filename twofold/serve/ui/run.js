/* One run as the page knows it: its rows as they arrive, sorted into curves, samples, rollouts and events. */

import { rows as ask } from "/ui/api.js";
import { Events } from "/ui/events.js";

const NOT_CURVES = new Set(["step", "time", "tokens", "rollouts"]);
const NOT_HELD = new Set(["loss", "pairs", "low", "high"]); // the loss is the row's valid_loss
const BOUNDED = ["pass@1", "accuracy", "reward"]; // what low and high of an evaluation are bounds of: the first there is
const ROUNDING = 1e-6;
const RECENT = 64;

/** `summary` is the run's entry of `/runs`, as of the last time it was asked for. */
export class Run {
  constructor(summary) {
    this.summary = summary;
    this.name = summary.name;
    this.reading = null;
    this.begin(null);
  }

  begin(version) {
    this.version = version;
    this.known = 0; // rows seen
    this.curves = new Map(); // key: [{step, time, tokens, value}]
    this.samples = new Map(); // prompt: [{step, text}]
    this.rollouts = []; // [{step, row}]: the number of the row that has them
    this.faults = 0; // of reward functions
    this.events = new Events();
    this.recent = [];
    this.tokens = 0;
    this.first = null;
  }

  /** Whether the server has rows that are not here. */
  get behind() {
    return this.version !== this.summary.version || this.known < this.summary.rows;
  }

  /** Ask for what is new until nothing is; a log that was cut back is read again from its beginning. */
  follow(signal) {
    this.reading ??= this.read(signal).finally(() => (this.reading = null)); // one reader at a time, or rows come twice
    return this.reading;
  }

  async read(signal) {
    for (let more = true; more; ) {
      const part = await ask(this.name, this.known, this.version, signal);
      if (part.version !== this.version || part.from !== this.known) this.begin(part.version);
      if (part.from !== this.known) return; // asked again at the next turn, from the first row
      part.rows.forEach((row) => this.add(row));
      more = part.more && part.rows.length > 0;
    }
  }

  add(row) {
    this.known += 1;
    const { step, time = null } = row;
    this.tokens = row.tokens ?? this.tokens;
    this.first ??= time;
    for (const [key, value] of Object.entries(row)) {
      if (NOT_CURVES.has(key) || (typeof value !== "number" && value !== null)) continue;
      this.point(row, key, value);
      if (key.startsWith("faults.")) this.faults += value ?? 0;
    }
    if (row.eval !== null && typeof row.eval === "object") this.held(row);
    if (typeof row.rollouts === "number" && row.loss === undefined) this.rollouts.push({ step, row: this.known - 1 });
    if (typeof row.prompt === "string" && typeof row.text === "string") {
      if (!this.samples.has(row.prompt)) this.samples.set(row.prompt, []);
      this.samples.get(row.prompt).push({ step, text: row.text });
    }
    if (typeof row.loss === "number" && time !== null) this.recent = [...this.recent, { step, time }].slice(-RECENT);
    this.events.add(row);
  }

  point({ step, time = null }, key, value, bounds = {}) {
    if (!this.curves.has(key)) this.curves.set(key, []);
    this.curves.get(key).push({ step, time: time - this.first, tokens: this.tokens, value, ...bounds });
  }

  /* What was found on held-out data: its figures are points beside those of training. */
  held(row) {
    const { low, high } = row.eval;
    const found = Object.entries(row.eval).filter(([key, value]) => typeof value === "number" && !NOT_HELD.has(key));
    const bounded = BOUNDED.find((key) => low - ROUNDING <= row.eval[key] && row.eval[key] <= high + ROUNDING);
    for (const [key, value] of found) this.point(row, `held.${key}`, value, key === bounded ? { low, high } : {});
  }

  /** The newest number of a curve, or undefined. */
  last(key) {
    return this.curves.get(key)?.at(-1).value ?? undefined;
  }

  /** Seconds to the last step at the speed of the last rows, or null where that is not known. */
  get left() {
    const { step, steps, state } = this.summary;
    const [from, to] = [this.recent[0], this.recent.at(-1)];
    if (state !== "running" || !steps || !from || to.step <= from.step) return null;
    return ((steps - step) * (to.time - from.time)) / (to.step - from.step);
  }
}
