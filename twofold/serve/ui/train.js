/* The training page: which runs there are, which are shown, and everything of those. */

import { ApiError, runs as list } from "/ui/api.js";
import { Chart } from "/ui/chart.js";
import { groups, lines } from "/ui/curves.js";
import { el } from "/ui/element.js";
import { Evaluations } from "/ui/evaluations.js";
import { Happenings } from "/ui/happenings.js";
import { keyDialog } from "/ui/key.js";
import { Rollouts } from "/ui/rollouts.js";
import { Run } from "/ui/run.js";
import { RunList } from "/ui/runlist.js";
import { Samples } from "/ui/samples.js";
import { count, duration, number, unitOfTime } from "/ui/series.js";
import { summary } from "/ui/summary.js";

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;
const HUES = 6; // colours to tell runs apart by, and so how many are shown at once

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
const headings = new Map(); // title of a group: its heading
const samples = new Samples($("samples"));
const rollouts = new Rollouts($("rollouts-controls"), $("rollouts"));
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
  $("rollouts-part").hidden = !rollouts.show(chosen());
  $("samples-part").hidden = !chosen().some(({ run }) => run.samples.size);
  samples.show(chosen());
  $("events-part").hidden = !happenings.show(chosen());
  jumps();
}

/* A run with rollouts makes a long page: a way to each of its parts. */
function jumps() {
  const parts = [...$("some").querySelectorAll("section:not([hidden])")].map((part) => part.querySelector("h2"));
  const words = parts.map((part) => part.textContent).join();
  $("jumps").hidden = $("rollouts-part").hidden;
  if (words === $("jumps").dataset.words) return;
  $("jumps").dataset.words = words;
  const jump = (part) => () => part.parentElement.parentElement.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  $("jumps").replaceChildren(...parts.map((part) => el("button", { type: "button", class: "quiet small", on: { click: jump(part) } }, part.textContent)));
}

/* Charts cost something with many rows: they are drawn again when there is something new to draw. */
let drawn = "";

function draw() {
  const now = JSON.stringify([view, chosen().map(({ run, hue }) => [run.name, hue, run.version, run.known])]);
  if (now === drawn) return;
  drawn = now;
  const found = groups(chosen().map(({ run }) => run));
  const lead = found.flatMap(({ curves }) => curves).find((curve) => curve.lead)?.title;
  const nodes = found.flatMap(({ title, curves }) => [...(found.length > 1 ? [heading(title)] : []), ...curves.map((curve) => chart(curve).node)]);
  const there = [...$("curves").children];
  if (nodes.length !== there.length || nodes.some((node, index) => node !== there[index])) $("curves").replaceChildren(...nodes);
  const { of, unit, whole } = AXES[view.axis];
  for (const curve of found.flatMap(({ curves }) => curves)) {
    const marks = curve.title === lead ? chosen().flatMap(({ run }) => marked(run, of)) : [];
    chart(curve).node.classList.toggle("tall", curve.title === lead);
    chart(curve).show(lines(curve, chosen(), of, view.weight), { log: Boolean(curve.log) && view.log, unit, whole, marks });
  }
}

function chart(curve) {
  if (!charts.has(curve.title)) charts.set(curve.title, new Chart({ ...curve, look }));
  return charts.get(curve.title);
}

function heading(title) {
  if (!headings.has(title)) headings.set(title, el("h3", { class: "group-title" }, title));
  return headings.get(title);
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
