/* A run in a few figures: what it is about (loss, reward or preferences), how far it is, and how long it takes. */

import { el } from "/ui/element.js";
import { count, duration, number, percent, precise } from "/ui/series.js";

/** The card of a run that is shown. */
export function summary({ run, hue }) {
  const { name, state, step, steps, tokens, tokens_per_second: speed, began, seconds } = run.summary;
  const took = began === null || seconds === null ? null : Date.now() / 1000 - seconds - began;
  const share = steps ? Math.min((step ?? 0) / steps, 1) : null;
  const bar = el("div", { class: "meter", role: "meter", "aria-label": "Steps done", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": Math.round(100 * (share ?? 0)) }, el("i"));
  bar.style.setProperty("--share", String(share ?? 0));
  return el(
    "article",
    { class: `summary hue-${hue}` },
    el("header", {}, el("h2", {}, el("i", { class: "swatch" }), name), el("span", { class: "state", data: { state } }, state)),
    share === null ? "" : bar,
    el(
      "dl",
      { class: "facts" },
      figure("Step", steps ? `${count(step ?? 0)} / ${count(steps)}` : said(step, count)),
      about(run),
      run.curves.has("margin") || run.curves.has("reward") ? [] : figure("Tokens", said(tokens, number)),
      figure("Tokens per second", said(speed, number)),
      run.left === null ? figure("Time", said(took, duration)) : figure("Time left", said(run.left, duration)),
    ),
  );
}

/* What the run is to move, on what it learns from and on what it does not. */
function about(run) {
  const [last, faults] = [(key, how) => said(run.last(key), how), run.faults];
  if (run.curves.has("reward")) {
    const kl = run.last("kl");
    return [
      figure("Reward", last("reward", number)),
      figure("Held-out reward", last("held.reward", number)),
      figure("KL to the trainer", kl === 0 ? "0.0 exactly" : said(kl, number)),
      faults ? figure("Faults of rewards", count(faults), "alarm") : [],
    ];
  }
  if (run.curves.has("margin")) {
    const told = run.curves.has("accuracy") ? [figure("Accuracy", last("accuracy", percent)), figure("Held-out accuracy", last("held.accuracy", percent))] : [];
    return [...told, figure("Margin", last("margin", number))];
  }
  return [figure("Training loss", said(run.summary.loss, precise)), figure("Validation loss", said(run.summary.valid_loss, precise))];
}

function figure(label, value, kind = false) {
  return value === null || value === undefined ? [] : [el("div", { class: kind }, el("dt", {}, label), el("dd", {}, value))];
}

function said(value, how) {
  return typeof value === "number" ? how(value) : null;
}
