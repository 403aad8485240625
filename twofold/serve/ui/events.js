/* What happened in a run beside its steps, found in its rows: [{step, time, kind, words}], in the order of the log. */

import { count, duration, median, number, precise } from "/ui/series.js";

/** The kinds in the order of their buttons, and what they are called. */
export const KINDS = {
  skipped: "Skipped",
  spike: "Spikes",
  pause: "Restarts",
  fault: "Faults of rewards",
  scale: "Loss scale",
  valid: "Validation",
  checkpoint: "Checkpoints",
  note: "Notes",
};

const WINDOW = 32; // losses and waits that say what is usual
const FEWEST = 12;
const SPIKE = 8; // times the usual distance from the usual loss
const FLOOR = 0.02; // of the loss: the least that is taken for a usual distance
const FEWEST_WAITS = 3;
const PAUSE_SECONDS = 60;
const PAUSE_TIMES = 20;
const WORDLESS = new Set(["prompt", "text"]);

/** Read rows one after the other; `events` grows. Checkpoints are not in a log, so they are given when asked. */
export class Events {
  constructor() {
    this.found = [];
    this.losses = [];
    this.waits = [];
    this.before = null;
    this.scale = null;
    this.best = null;
    this.highest = null;
    this.above = false;
  }

  add(row) {
    this.wait(row);
    if (typeof row.skipped === "string") this.say(row, "skipped", `skipped: ${row.skipped}`);
    if (typeof row.loss === "number") this.loss(row);
    if (typeof row.loss_scale === "number") this.scaled(row);
    if (row.valid_loss !== undefined) this.valid(row);
    else if (typeof row.eval?.reward === "number") this.reward(row);
    this.faults(row);
    const words = Object.entries(row).filter(([key, value]) => typeof value === "string" && key !== "skipped");
    if (words.length && !words.some(([key]) => WORDLESS.has(key))) {
      this.say(row, "note", words.map(([key, value]) => `${key}: ${value}`).join(", "));
    }
  }

  /** Everything in order of steps, with the checkpoints that are on the disk. */
  all(checkpoints) {
    const saved = checkpoints.map(({ step, time }) => ({ step, time, kind: "checkpoint", words: "checkpoint on the disk" }));
    return [...this.found, ...saved].sort((one, other) => one.step - other.step || one.time - other.time);
  }

  say(row, kind, words) {
    this.found.push({ step: row.step, time: row.time, kind, words });
  }

  wait(row) {
    if (typeof row.time !== "number") return;
    const waited = this.before === null ? 0 : row.time - this.before;
    const usual = this.waits.length >= FEWEST_WAITS ? median(this.waits) : Infinity;
    if (waited > Math.max(PAUSE_SECONDS, PAUSE_TIMES * usual)) this.say(row, "pause", `went on after ${duration(waited)} without a row`);
    else if (this.before !== null) this.waits = [...this.waits, waited].slice(-WINDOW);
    this.before = row.time;
  }

  loss(row) {
    const usual = median(this.losses);
    const spread = median(this.losses.map((loss) => Math.abs(loss - usual)));
    const above = this.losses.length >= FEWEST && row.loss - usual > SPIKE * Math.max(spread, FLOOR * Math.abs(usual));
    if (above && !this.above) this.say(row, "spike", `loss ${precise(row.loss)} where ${precise(usual)} was usual`);
    this.above = above;
    this.losses.push(row.loss);
    if (this.losses.length > WINDOW) this.losses.shift();
  }

  scaled(row) {
    if (this.scale !== null && this.scale !== row.loss_scale) this.say(row, "scale", `loss scale ${count(this.scale)} to ${count(row.loss_scale)}`);
    this.scale = row.loss_scale;
  }

  valid(row) {
    const value = row.valid_loss;
    if (value === null) return this.say(row, "valid", "validation loss is not a number");
    const better = this.best === null || value < this.best.valid_loss;
    const beside = better ? (this.best ? ", the best so far" : "") : `, ${number(value - this.best.valid_loss)} over that of step ${count(this.best.step)}`;
    if (better) this.best = row;
    return this.say(row, "valid", `validation loss ${precise(value)}${beside}`);
  }

  reward(row) {
    const value = row.eval.reward;
    const under = this.highest ? this.highest.eval.reward - value : -1;
    const beside = under > 0 ? `, ${number(under)} under that of step ${count(this.highest.step)}` : under === 0 ? `, as in step ${count(this.highest.step)}` : this.highest ? ", the best so far" : "";
    if (under < 0) this.highest = row;
    this.say(row, "valid", `held-out reward ${number(value)}${beside}`);
  }

  faults(row) {
    for (const [key, value] of Object.entries(row)) {
      if (!key.startsWith("faults.") || !(value > 0)) continue;
      this.say(row, "fault", `the reward ${key.slice(7)} failed for ${count(value)} ${value === 1 ? "answer" : "answers"}`);
    }
  }
}
