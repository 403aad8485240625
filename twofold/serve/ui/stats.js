/* The live view: what the engine is doing, asked once a second while someone looks. */

import { stats } from "/ui/api.js";
import { el, svg } from "/ui/element.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000; // between tries of a server that does not answer
const KEEP = 60;
const WIDTH = 240;
const HEIGHT = 44;
const ROWS = 6;

const STATES = {
  ready: "live",
  starting: "loading the model",
  restarting: "starting again",
  draining: "shutting down",
  failed: "the model has failed",
};

/**
 * Polls `/stats` and shows it in `root`; `state` is the small word beside the title.
 * `ready()` is called when a model that was not ready, or a server that was away, has become ready.
 */
export class Live {
  constructor(root, state, ready) {
    this.state = state;
    this.ready = ready;
    this.speeds = [];
    this.before = null;
    this.timer = 0;
    this.running = figure("Running");
    this.waiting = figure("Waiting");
    this.hits = figure("Prefix hits", "Share of prompt tokens found in the cache");
    this.cache = meter("KV cache");
    this.speed = el("b", { class: "value" }, "0");
    this.line = svg("polyline", { points: "" });
    this.area = svg("polygon", { points: "" });
    const plot = svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line);
    this.requests = el("ul", { class: "requests", "aria-label": "Requests" });
    root.append(
      el("dl", { class: "figures" }, this.running.node, this.waiting.node, this.hits.node),
      this.cache.node,
      el("div", { class: "speed" }, el("p", {}, this.speed, " tokens/s", el("span", {}, "last minute")), plot),
      this.requests,
    );
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(this.timer) : this.tick()));
  }

  /** Start, or start again at once: after a key was given, say. */
  async tick() {
    clearTimeout(this.timer);
    let wait = EVERY_MS;
    try {
      const now = await stats(AbortSignal.timeout(PATIENCE_MS));
      this.show(now, performance.now());
      const was = this.state.dataset.state;
      this.say(now.state === "ready" ? "live" : "wait", STATES[now.state] ?? now.state);
      if (was !== "live" && was !== "new" && now.state === "ready") this.ready();
    } catch (error) {
      wait = PATIENCE_MS;
      this.before = null;
      this.say("off", error.status === 401 ? "needs a key" : "not reachable");
    }
    clearTimeout(this.timer); // two ticks may have been under way
    if (!document.hidden) this.timer = setTimeout(() => this.tick(), wait);
  }

  show(now, at) {
    this.running.set(String(now.running));
    this.waiting.set(String(now.waiting));
    this.hits.set(`${Math.round(100 * now.prefix_cache_hit_rate)}%`);
    this.cache.set(now.kv_cache_usage);
    const made = now.generation_tokens_total;
    // a total that fell means a restarted server: begin anew instead of drawing a cliff
    if (this.before && made >= this.before.made) {
      this.speeds = [...this.speeds, ((made - this.before.made) * 1000) / (at - this.before.at)].slice(-KEEP);
    }
    this.before = { made, at };
    this.draw();
    this.list(now.requests ?? []);
  }

  list(requests) {
    const rows = requests.slice(0, ROWS).map((request) =>
      el(
        "li",
        { data: { state: request.state } },
        el("span", {}, request.state),
        `${request.prompt_tokens} + ${request.output_tokens} tokens`,
        el("time", {}, `${request.seconds.toFixed(0)} s`),
      ),
    );
    if (requests.length > ROWS) rows.push(el("li", {}, `and ${requests.length - ROWS} more`));
    if (!rows.length) rows.push(el("li", {}, "no requests")); // keeps its line, so that nothing below jumps
    this.requests.replaceChildren(...rows);
  }

  draw() {
    const now = this.speeds.at(-1) ?? 0;
    this.speed.textContent = now < 10 && now > 0 ? now.toFixed(1) : String(Math.round(now));
    const top = Math.max(1, ...this.speeds);
    const step = WIDTH / (KEEP - 1);
    const left = WIDTH - step * (this.speeds.length - 1);
    const points = this.speeds.map((speed, index) => `${(left + index * step).toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 6) * (speed / top)).toFixed(1)}`);
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", points.length ? [`${left.toFixed(1)},${HEIGHT}`, ...points, `${WIDTH},${HEIGHT}`].join(" ") : "");
  }

  say(state, words) {
    this.state.dataset.state = state;
    this.state.textContent = words;
  }
}

function figure(label, title = null) {
  const value = el("dd", {}, "–");
  return { node: el("div", { title }, el("dt", {}, label), value), set: (text) => (value.textContent = text) };
}

function meter(label) {
  const bar = el("div", { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": "0" }, el("i"));
  const value = el("span", {}, "–");
  const set = (share) => {
    const percent = 100 * share;
    bar.setAttribute("aria-valuenow", percent.toFixed(0));
    bar.style.setProperty("--share", share.toFixed(4));
    value.textContent = `${percent.toFixed(percent < 10 ? 1 : 0)}%`;
  };
  return { node: el("div", { class: "cache" }, el("p", {}, label, value), bar), set };
}
