/* The overview page: what the server did in the last half hour, and what it does now. */

import { ApiError, history as look, recent } from "/ui/api.js";
import { Chart } from "/ui/chart.js";
import { el } from "/ui/element.js";
import { keyDialog } from "/ui/key.js";
import { count, number, percent } from "/ui/series.js";

const PATIENCE_MS = 8000;
const AGAIN_MS = 5000;
const SHOWN = 8;
const STATES = { ready: "live", starting: "loading the model", restarting: "starting again", draining: "shutting down", failed: "the model has failed", stopped: "not in memory" };

const share = (part, whole) => (whole ? part / whole : null);
const seconds = (value) => (value < 1 ? `${number(1000 * value)} ms` : `${number(value)} s`);
const clock = (x) => new Date(1000 * x).toLocaleTimeString("en-GB");

/* Each chart: its lines as [name, row -> y or null]; a line without a number in any row is left out. */
const CHARTS = [
  { title: "Tokens a second", tall: true, say: number, lines: [["written", (row) => share(row.generation_tokens, row.seconds)], ["of prompts", (row) => share(row.prompt_tokens, row.seconds)]] },
  { title: "To the first token", say: seconds, lines: [["half within", (row) => row.first_p50], ["95% within", (row) => row.first_p95]] },
  { title: "Between tokens", say: seconds, lines: [["half within", (row) => row.between_p50], ["95% within", (row) => row.between_p95]] },
  { title: "Requests", say: count, lines: [["running", (row) => row.running], ["waiting", (row) => row.waiting]] },
  { title: "Cache in use", say: percent, lines: [["", (row) => row.kv_usage]] },
  { title: "Prompt tokens found in the cache", say: percent, lines: [["", (row) => share(row.prefix_hits, row.prefix_queries)]] },
  { title: "Preemptions", say: count, lines: [["", (row) => row.preemptions]] },
  { title: "Guessed tokens that were right", say: percent, lines: [["", (row) => share(row.accepted_tokens, row.draft_tokens)]] },
];

const $ = (id) => document.getElementById(id);
const charts = CHARTS.map((one) => new Chart({ ...one, look: (x) => charts.forEach((chart) => chart.read(x)) }));
let rows = [];
let next = 0;
let began = 0;
let every = 0;
let timer = 0;

/* ---- the server ---- */

async function tick() {
  clearTimeout(timer);
  const wait = (await hear()) ? 1000 * every : AGAIN_MS;
  clearTimeout(timer); // two ticks may have been under way
  if (!document.hidden && !$("key-dialog").open) timer = setTimeout(tick, wait);
}

async function hear() {
  const model = $("model").value;
  try {
    const [told, last] = await Promise.all([look(next, model, AbortSignal.timeout(PATIENCE_MS)), recent(SHOWN, AbortSignal.timeout(PATIENCE_MS))]);
    if (model && model !== $("model").value) return true; // another was chosen meanwhile
    take(told);
    list(last.data);
    say(told.state === "ready" ? "live" : "wait", STATES[told.state] ?? told.state);
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

/* New rows behind those that are there; a server that was started again begins anew. */
function take(told) {
  if (told.began !== began) {
    began = told.began;
    rows = [];
    if (told.from > next || next > told.from + told.rows.length) next = 0;
  }
  rows = [...rows, ...told.rows.filter((row) => !rows.length || row.time > rows.at(-1).time)].filter((row) => row.time > (told.rows.at(-1) ?? rows.at(-1)).time - 1800);
  next = told.from + told.rows.length;
  every = told.every;
  names(told);
  draw();
}

function names({ model, models }) {
  if (models.join() !== [...$("model").options].map((option) => option.value).join()) {
    $("model").replaceChildren(...models.map((name) => el("option", { value: name }, name)));
    $("model").value = model;
    $("model").disabled = models.length < 2;
  }
}

/* ---- what is shown ---- */

function draw() {
  const restarts = rows.filter((row) => row.restarts).map((row) => ({ x: row.time, kind: "restart" }));
  CHARTS.forEach((one, index) => {
    const lines = one.lines.map(([name, of], hue) => ({ name, hue, points: rows.map((row) => [row.time, of(row)]).filter(([, y]) => y !== null) }));
    charts[index].show(lines, { unit: clock, whole: (width) => (width > 180 ? 60 : 1), marks: one.tall ? restarts : [] });
  });
  $("now").replaceChildren(...facts().map(([name, value, alarm]) => el("div", { class: alarm ? "alarm" : null }, el("dt", {}, name), el("dd", {}, value))));
}

/* The last row, and sums of all that are shown. */
function facts() {
  const last = rows.at(-1) ?? {};
  const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
  const latest = (name) => rows.findLast((row) => row[name] !== null)?.[name];
  const shown = (value, words) => (value === null || value === undefined ? "–" : words(value));
  return [
    ["Tokens a second", shown(share(last.generation_tokens, last.seconds), number)],
    ["Running", shown(last.running, count)],
    ["Waiting", shown(last.waiting, count)],
    ["First token, median", shown(latest("first_p50"), seconds)],
    ["Next token, median", shown(latest("between_p50"), seconds)],
    ["Cache in use", shown(last.kv_usage, percent)],
    ["Found in the cache", shown(share(sum("prefix_hits"), sum("prefix_queries")), percent)],
    ["Guesses right", shown(share(sum("accepted_tokens"), sum("draft_tokens")), percent)],
    ["Preemptions", count(sum("preemptions"))],
    ["Refused", count(sum("rejected")), sum("rejected") > 0],
    ["Restarts", count(sum("restarts")), sum("restarts") > 0],
  ];
}

function list(requests) {
  const line = (one) =>
    el("li", { data: { state: one.state } }, el("span", {}, one.state === "finished" ? String(one.status) : one.state), el("code", {}, one.id), ` ${count(one.prompt_tokens)} + ${count(one.output_tokens)} tokens`, el("time", {}, seconds(one.timings.total_seconds)));
  $("requests").replaceChildren(...(requests.length ? requests.map(line) : [el("li", {}, "no requests yet")]));
}

$("charts").append(...charts.map((chart, index) => (chart.node.classList.toggle("tall", Boolean(CHARTS[index].tall)), chart.node)));
$("model").addEventListener("change", () => {
  [began, next] = [0, 0];
  tick();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : tick()));
tick();
