/* The training page: which runs there are, which are shown, and everything of those. */

import { ApiError, runs as list } from "/ui/api.js";
import { Chart } from "/ui/chart.js";
import { el } from "/ui/element.js";
import { Evaluations } from "/ui/evaluations.js";
import { Happenings } from "/ui/happenings.js";
import { keyDialog } from "/ui/key.js";
import { Run } from "/ui/run.js";
import { RunList } from "/ui/runlist.js";
import { Samples } from "/ui/samples.js";
import { binary, count, duration, gibibytes, number, percent, precise, smooth, unitOfTime } from "/ui/series.js";

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;
const HUES = 6; // colours to tell runs apart by, and so how many are shown at once

/* Curves in their order; what else a log holds gets a chart of its own behind them. */
const CURVES = [
  { keys: ["loss", "valid_loss"], title: "Loss", say: precise, axis: number, log: true, tall: true, smooth: true },
  { keys: ["grad_norm"], title: "Gradient norm", say: number, log: true, smooth: true },
  { keys: ["lr"], title: "Learning rate", say: number },
  { keys: ["tokens_per_second"], title: "Tokens per second", say: number, smooth: true },
  { keys: ["peak_share"], title: "Share of the machine's peak", say: percent, smooth: true },
  { keys: ["memory"], title: "Memory", say: gibibytes, base: binary },
  { keys: ["loss_scale"], title: "Loss scale", say: number },
];
const NAMES = { loss: "training", valid_loss: "validation" };
const AXES = {
  step: { of: (point) => point.step, unit: count },
  tokens: { of: (point) => point.tokens, unit: number },
  time: { of: (point) => point.time, unit: duration, whole: unitOfTime },
};
const MARKED = new Set(["skipped", "spike", "pause"]);

const $ = (id) => document.getElementById(id);
const known = new Map(); // name: Run
const shown = new Map(); // name: hue
const charts = new Map(); // title: Chart
const samples = new Samples($("samples"));
const evaluations = new Evaluations($("evaluations"));
const happenings = new Happenings($("kinds"), $("events"));
const runList = new RunList($("runs"), toggle);
const view = { axis: "step", weight: 0.8, log: false, ...remembered() };
let timer = 0;

function remembered() {
  try {
    return JSON.parse(localStorage.getItem("twofold.curves")) ?? {};
  } catch {
    return {};
  }
}

/* ---- the server ---- */

async function tick() {
  clearTimeout(timer);
  if (await hear()) render();
  clearTimeout(timer); // two ticks may have been under way
  if (!document.hidden && !$("key-dialog").open) timer = setTimeout(tick, EVERY_MS);
}

/* What is new: the runs, and the rows of those that are shown. */
async function hear() {
  try {
    const { directory, runs } = await list(AbortSignal.timeout(PATIENCE_MS));
    meet(runs, directory);
    const late = chosen().filter(({ run }) => run.behind);
    await Promise.all(late.map(({ run }) => run.follow(AbortSignal.timeout(PATIENCE_MS))));
    say("live", "live");
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    say("off", error.status === 401 ? "needs a key" : "not reachable");
    if (error.status === 401) ask(tick);
    return false;
  }
}

const ask = keyDialog({ given: () => ($("unlock").hidden = true), refused: () => ($("unlock").hidden = false) });
$("unlock").addEventListener("click", () => ask(tick));

function say(state, words) {
  $("live-state").dataset.state = state;
  $("live-state").textContent = words;
}

function meet(runs, directory) {
  const names = new Set(runs.map((run) => run.name));
  for (const name of [...known.keys()].filter((name) => !names.has(name))) {
    known.delete(name);
    shown.delete(name);
  }
  for (const summary of runs) {
    if (known.has(summary.name)) known.get(summary.name).summary = summary;
    else known.set(summary.name, new Run(summary));
  }
  const asked = location.hash.slice(1).split("&").map(decode).filter((name) => known.has(name));
  if (!shown.size) (asked.length ? asked : runs.slice(0, 1).map((run) => run.name)).slice(0, HUES).forEach(choose);
  $("directory").textContent = directory;
  $("none").hidden = runs.length > 0;
  $("some").hidden = runs.length === 0;
}

/* ---- which runs ---- */

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

function chosen() {
  return [...shown].map(([name, hue]) => ({ run: known.get(name), hue }));
}

function choose(name) {
  const taken = new Set(shown.values());
  shown.set(name, [...Array(HUES).keys()].find((hue) => !taken.has(hue)));
}

function toggle(name, alone) {
  if (alone) shown.clear();
  if (!shown.has(name)) choose(name);
  else if (shown.size > 1) shown.delete(name);
  history.replaceState(null, "", `#${[...shown.keys()].map(encodeURIComponent).join("&")}`);
  render();
  tick();
}

/* ---- what is shown of them ---- */

function render() {
  const runs = [...known.values()].map((run) => run.summary);
  runs.sort((one, other) => (other.began ?? 1e12) - (one.began ?? 1e12)); // the newest first
  runList.show(runs, shown, shown.size >= HUES);
  $("summaries").replaceChildren(...chosen().map(summary));
  $("summaries").classList.toggle("many", shown.size > 1);
  draw();
  $("evaluations-part").hidden = !evaluations.show(chosen());
  $("samples-part").hidden = !chosen().some(({ run }) => run.samples.size);
  samples.show(chosen());
  $("events-part").hidden = !happenings.show(chosen());
}

function summary({ run, hue }) {
  const { name, state, step, steps, loss, valid_loss: valid, tokens, tokens_per_second: speed, began, seconds } = run.summary;
  const took = began === null || seconds === null ? null : Date.now() / 1000 - seconds - began;
  const figure = (label, value) => (value === null || value === undefined ? [] : [el("div", {}, el("dt", {}, label), el("dd", {}, value))]);
  const share = steps ? Math.min((step ?? 0) / steps, 1) : null;
  const bar = el("div", { class: "meter", role: "meter", "aria-label": "Steps done", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": Math.round(100 * (share ?? 0)) }, el("i"));
  bar.style.setProperty("--share", String(share ?? 0));
  const said = (value, how) => (typeof value === "number" ? how(value) : null);
  return el(
    "article",
    { class: `summary hue-${hue}` },
    el("header", {}, el("h2", {}, el("i", { class: "swatch" }), name), el("span", { class: "state", data: { state } }, state)),
    share === null ? "" : bar,
    el(
      "dl",
      { class: "facts" },
      figure("Step", steps ? `${count(step ?? 0)} / ${count(steps)}` : said(step, count)),
      figure("Training loss", said(loss, precise)),
      figure("Validation loss", said(valid, precise)),
      figure("Tokens", said(tokens, number)),
      figure("Tokens per second", said(speed, number)),
      run.left === null ? figure("Time", said(took, duration)) : figure("Time left", said(run.left, duration)),
    ),
  );
}

/* Charts cost something with many rows: they are drawn again when there is something new to draw. */
let drawn = "";

function draw() {
  const now = JSON.stringify([view, chosen().map(({ run, hue }) => [run.name, hue, run.version, run.known])]);
  if (now === drawn) return;
  drawn = now;
  const extra = new Set(chosen().flatMap(({ run }) => [...run.curves.keys()]));
  CURVES.forEach(({ keys }) => keys.forEach((key) => extra.delete(key)));
  const others = [...extra].sort().map((key) => ({ keys: [key], title: key.replaceAll("_", " "), say: number }));
  const titles = new Set();
  for (const curve of [...CURVES, ...others]) {
    titles.add(curve.title);
    if (!charts.has(curve.title)) {
      const chart = new Chart({ ...curve, look });
      charts.set(curve.title, chart);
      $("curves").append(chart.node);
    }
    const { of, unit, whole } = AXES[view.axis];
    const marks = curve.tall ? chosen().flatMap(({ run }) => marked(run, of)) : [];
    charts.get(curve.title).show(lines(curve, of), { log: Boolean(curve.log) && view.log, unit, whole, marks });
  }
  for (const [title, chart] of charts) chart.node.hidden ||= !titles.has(title);
}

function lines(curve, of) {
  return chosen().flatMap(({ run, hue }) =>
    curve.keys.filter((key) => run.curves.has(key)).map((key) => {
      const [dots, points] = [key === "valid_loss", run.curves.get(key)];
      const weight = curve.smooth && !dots ? view.weight : 0;
      const pairs = (values) => points.map((point, index) => [of(point), values[index]]).filter(([, y]) => y !== null);
      const raw = points.map((point) => point.value);
      const name = [shown.size > 1 ? run.name : "", NAMES[key] ?? ""].filter(Boolean).join(" · ");
      const own = dots && shown.size === 1 ? 1 : hue; // one run alone has both colours
      return { name, hue: own, kind: dots ? "dots" : null, points: pairs(smooth(raw, weight)), faint: weight ? pairs(raw) : null };
    }),
  );
}

/* Events are known by their step; the loss nearest to it says where that is on another axis. */
function marked(run, of) {
  const losses = run.curves.get("loss") ?? [];
  return run.events.found.filter(({ kind }) => MARKED.has(kind)).flatMap(({ step, kind }) => {
    const point = losses.find((one) => one.step >= step);
    return point ? [{ x: of(point), kind }] : [];
  });
}

function look(x) {
  charts.forEach((chart) => chart.read(x));
}

/* ---- how it is shown ---- */

function changed() {
  localStorage.setItem("twofold.curves", JSON.stringify(view));
  $("smooth-now").textContent = view.weight ? view.weight.toFixed(2) : "off";
  draw();
}

if (!(view.axis in AXES)) view.axis = "step";
$("smooth").value = String(view.weight);
$("axis").value = view.axis;
$("log").checked = view.log;
$("smooth").addEventListener("input", () => {
  view.weight = Number($("smooth").value);
  changed();
});
$("axis").addEventListener("change", () => {
  view.axis = $("axis").value;
  look(null); // what was pointed at has no place on the other axis
  changed();
});
$("log").addEventListener("change", () => {
  view.log = $("log").checked;
  changed();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : tick()));
changed();
tick();
