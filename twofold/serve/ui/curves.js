/* Which charts there are: groups of curves in their order, found from the keys of the runs' rows.

     row {"step": 7, "reward": 0.6, "reward_std": 0.3}      ▶ a line, and a band of its spread around it
     row {"step": 10, "eval": {"reward": 0.8, "low": ..}}   ▶ dots in the same chart, each on its interval

   A curve is {title, keys, names, say, axis, base, log, smooth, lead, spread, rest}: one line for each key, named where
   they are several. `lead` may be the page's large chart: the first that has something is. A curve that never leaves
   `rest` says nothing and is left out. Keys that no curve knows get a chart each, behind all others. */

import { binary, count, gibibytes, number, percent, precise, smooth } from "/ui/series.js";

const HELD = "held.";
const HUES = 6;
const PART = "rewards.";
const FAULT = "faults.";

const exact = (value) => (value === 0 ? "0.0 exactly" : number(value));

const PREFERENCES = [
  { keys: ["accuracy"], title: "Accuracy", say: percent, smooth: true, lead: true },
  { keys: ["margin"], title: "Margin", say: number, smooth: true },
  { keys: ["chosen", "rejected"], names: ["chosen", "rejected"], title: "Chosen and rejected", say: number, smooth: true },
  { keys: ["baseline"], title: "Baseline", say: number, smooth: true },
];
const POLICY = [
  { keys: ["kl"], title: "KL, rollout against trainer", say: exact, axis: number },
  { keys: ["ref_kl"], title: "KL against the reference", say: number, smooth: true },
  { keys: ["entropy"], title: "Entropy", say: number, smooth: true },
  { keys: ["clipped", "clipped_low", "clipped_high"], names: ["all", "below", "above"], title: "Clipped share", say: percent, smooth: true },
  { keys: ["approx_kl"], title: "KL within an update", say: number, smooth: true },
  { keys: ["kl_coef"], title: "Weight of the KL", say: number },
  { keys: ["clipped_dual"], title: "Clipped share, dual", say: percent, rest: 0 },
  { keys: ["mismatch"], title: "Mismatch of log-probabilities", say: number, rest: 0 },
  { keys: ["equal"], title: "Tokens with equal log-probability", say: percent, rest: 1 },
  { keys: ["largest_ratio"], title: "Largest ratio", say: number },
  { keys: ["masked"], title: "Masked share", say: percent, rest: 0 },
];
const VALUES = [
  { keys: ["value"], title: "Value", say: number, smooth: true },
  { keys: ["explained_variance"], title: "Explained variance", say: number, smooth: true },
  { keys: ["value_loss"], title: "Value loss", say: number, smooth: true },
  { keys: ["value_clipped"], title: "Clipped share of values", say: percent, rest: 0 },
];
const ANSWERS = [
  { keys: ["length"], title: "Length in tokens", say: number, smooth: true },
  { keys: ["truncated"], title: "Share cut off at the limit", say: percent, smooth: true },
  { keys: ["learned"], title: "Answers learned from", say: count, axis: number },
  { keys: ["skipped_rollouts"], title: "Answers without a reward", say: count, axis: number, rest: 0 },
];
const TRAINING = [
  { keys: ["loss"], names: ["training"], title: "Loss", say: precise, axis: number, log: true, smooth: true, lead: true },
  { keys: ["grad_norm"], title: "Gradient norm", say: number, log: true, smooth: true },
  { keys: ["lr"], title: "Learning rate", say: number },
  { keys: ["tokens_per_second"], title: "Tokens per second", say: number, smooth: true },
  { keys: ["rollout_tokens_per_second"], title: "Rollout tokens per second", say: number, smooth: true },
  { keys: ["seconds_rollout", "seconds_reward", "seconds_update"], names: ["rollouts", "rewards", "update"], title: "Seconds of a step", say: number, smooth: true },
  { keys: ["prompt_tokens", "cached_tokens"], names: ["all", "found in the cache"], title: "Prompt tokens of rollouts", say: number },
  { keys: ["preemptions"], title: "Answers put back for others", say: count, axis: number, rest: 0 },
  { keys: ["peak_share"], title: "Share of the machine's peak", say: percent, smooth: true },
  { keys: ["memory"], title: "Memory", say: gibibytes, base: binary },
  { keys: ["loss_scale"], title: "Loss scale", say: number },
];

/** The groups of charts for the keys that some runs have: [{title, curves}], empty ones left out. */
export function groups(runs) {
  const left = new Set(runs.flatMap((run) => [...run.curves.keys()]));
  const found = [
    { title: "Rewards", curves: rewards([...left]) },
    { title: "Preferences", curves: PREFERENCES },
    { title: "Policy", curves: POLICY },
    { title: "Values", curves: VALUES },
    { title: "Answers", curves: ANSWERS },
    { title: "Training", curves: TRAINING },
  ].map(({ title, curves }) => ({ title, curves: curves.filter(({ keys }) => take(left, keys)) }));
  left.delete("reward_std"); // the band of a reward
  left.delete(`${HELD}reward_std`);
  const parts = [...left].filter((key) => key.startsWith(PART) || key.startsWith(HELD + PART)); // of a reward with one part alone
  parts.forEach((key) => left.delete(key));
  const others = [...left].sort().map((key) => ({ keys: [key], title: key.replace(HELD, "held-out ").replaceAll("_", " "), say: number }));
  found.at(-1).curves.push(...others);
  return found.map(({ title, curves }) => ({ title, curves: curves.filter((curve) => speaks(curve, runs)) })).filter(({ curves }) => curves.length);
}

/* Take the keys of a curve, and of what was held out beside it, out of those that are left; whether there were any. */
function take(left, keys) {
  return keys.flatMap((key) => [key, twin(key)]).map((key) => left.delete(key)).some(Boolean);
}

/* The reward, each of its parts where it has several, pass@k, and what reward functions failed at. */
function rewards(keys) {
  const named = (start) => [...new Set(keys.map((key) => key.replace(HELD, "")).filter((key) => key.startsWith(start)))].sort();
  const parts = named(PART).map((key) => ({ keys: [key], title: `Reward: ${key.slice(PART.length)}`, say: number, smooth: true }));
  const passes = named("pass@").map((key) => ({ keys: [key], title: `Held-out ${key}`, say: percent, lead: true }));
  const faults = named(FAULT);
  return [
    { keys: ["reward"], title: "Reward", say: number, smooth: true, lead: true, spread: "reward_std" },
    ...passes,
    ...(parts.length > 1 ? parts : []),
    { keys: faults, names: faults.map((key) => key.slice(FAULT.length)), title: "Faults of reward functions", say: count, axis: number, rest: 0 },
  ];
}

function speaks({ keys, rest }, runs) {
  return rest === undefined || runs.some((run) => keys.some((key) => run.curves.get(key)?.some(({ value }) => value !== rest)));
}

/* Where a log has the same figure of what was held out. */
function twin(key) {
  return key === "loss" ? "valid_loss" : HELD + key;
}

/** The lines of a curve for `shown`, [{run, hue}]: `of(point)` is a point's x, `weight` that of smoothing. */
export function lines(curve, shown, of, weight) {
  return shown.flatMap(({ run, hue }) =>
    curve.keys.flatMap((key, place) => {
      const alone = shown.length === 1;
      const [points, held] = [run.curves.get(key), run.curves.get(twin(key))];
      const own = curve.names?.[place] ?? (held && points ? "training" : "");
      const title = (words) => [alone ? "" : run.name, words].filter(Boolean).join(" · ");
      const main = { name: title(own), hue: alone ? place % HUES : hue, kind: alone || !place ? null : "dashes" };
      const beside = key === "loss" ? "validation" : [curve.keys.length > 1 ? own : "", "held out"].filter(Boolean).join(", ");
      const dots = { name: title(beside), hue: alone && points && curve.keys.length === 1 ? 1 : main.hue, kind: "dots" }; // one line alone has both colours
      return [
        ...(points ? [{ ...main, ...drawn(points, of, curve.smooth ? weight : 0, run.curves.get(curve.spread)) }] : []),
        ...(held ? [{ ...dots, ...drawn(held, of, 0) }] : []),
      ];
    }),
  );
}

/* A line's points, the unsmoothed ones behind it, and the band that `spread` is wide to either side. */
function drawn(points, of, weight, spread) {
  const raw = points.map(({ value }) => value);
  const pairs = (values) => points.map((point, index) => [of(point), values[index], point.low, point.high]).filter(([, y]) => y !== null);
  const middle = smooth(raw, weight);
  const wide = spread?.length === points.length ? smooth(spread.map(({ value }) => value), weight) : null;
  const band = wide && points.map((point, index) => [of(point), middle[index] - wide[index], middle[index] + wide[index]]).filter((_, index) => middle[index] !== null && wide[index] !== null);
  return { points: pairs(middle), faint: weight ? pairs(raw) : null, band };
}
