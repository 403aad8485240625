/* One chart: lines over a common x, drawn as SVG at the size it has; the pointer and the arrow keys read values off it.

   title ................ what the lines say at x        every chart of the page shows the same x,
   4 ┤ ╲   |             so the readings of all stand in one column of time
   2 ┤  ╲__|____
     └─────┴──── */

import { el, svg } from "/ui/element.js";
import { logTicks, nearest, thin, ticks } from "/ui/series.js";

const LEFT = 52;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;
const EDGE = 4;
const REACH = 60; // pixels from the pointer to the measurement that it reads
const FEWEST_POINTS = 60; // at most so many lone measurements get a dot each
const MOVES = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };

/**
 * `say(y)` writes a value, `axis(y)` a round one, `base(high)` is what round values are counted in. `look(x)` is called with the x under the pointer, or null: the page then tells every chart
 * by `read`. A line is {name, hue, kind, points: [[x, y]], faint: [[x, y]], band: [[x, low, high]]}; `kind` "dots" draws
 * measurements apart, each on its interval where a point is [x, y, low, high].
 */
export class Chart {
  constructor({ title, say, look, axis = say, base = () => 1 }) {
    this.say = say;
    this.axis = axis;
    this.base = base;
    this.lines = [];
    this.at = null;
    this.title = title;
    this.look = look;
    this.readout = el("output", { class: "readout" });
    this.picture = svg("svg", { class: "picture", tabindex: "0", role: "img", "aria-label": title });
    this.node = el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, title), this.readout), this.picture);
    this.picture.addEventListener("pointermove", (event) => look(this.under(event)));
    this.picture.addEventListener("pointerdown", (event) => look(this.under(event)));
    this.picture.addEventListener("pointerleave", () => look(null));
    this.picture.addEventListener("blur", () => look(null));
    this.picture.addEventListener("keydown", (event) => this.move(event));
    this.sized = new ResizeObserver(() => this.draw());
    this.sized.observe(this.picture);
  }

  /** Take what to show; `unit(x)` writes an x, `whole(width)` is what round ones are counted in, `marks` are places of events: [{x, kind}]. */
  show(lines, { log = false, unit = String, whole = () => 1, marks = [] }) {
    this.lines = lines.filter((line) => line.points.length);
    this.options = { log, unit, whole, marks };
    this.node.hidden = !this.lines.length;
    this.draw();
  }

  draw(again = true) {
    const { clientWidth: width, clientHeight: height } = this.picture;
    if (!this.lines.length || !width) return;
    const [w, h] = [width - LEFT - RIGHT, height - TOP - BOTTOM];
    const log = this.options.log && this.lines.every(({ points, faint }) => [...points, ...(faint ?? [])].every(([, y]) => y > 0));
    const [xs, ys] = [span(this.lines.flatMap(({ points }) => [points[0][0], points.at(-1)[0]])), heights(this.lines, log)];
    const level = log ? Math.log10 : Number;
    this.x = (x) => (w * (x - xs[0])) / (xs[1] - xs[0] || 1);
    this.y = (y) => h - (h * (level(y) - level(ys[0]))) / (level(ys[1]) - level(ys[0]) || 1);
    this.back = (place) => xs[0] + ((place - LEFT) / w) * (xs[1] - xs[0]);
    this.height = h;
    const across = ticks(...xs, Math.max(2, Math.floor(w / 90)), this.options.whole(xs[1] - xs[0])).map((x) => this.tick(x, h));
    const up = (log ? logTicks : ticks)(...ys, Math.max(2, Math.floor(h / 34)), this.base(ys[1])).map((y) => this.grid(y, w));
    this.cursor = svg("g", { class: "cursor" });
    // an inner svg cuts off what is drawn outside it; dots on the edge are whole
    const inside = svg("svg", { x: LEFT - EDGE, y: TOP, width: w + 2 * EDGE, height: h, viewBox: `${-EDGE} 0 ${w + 2 * EDGE} ${h}` }, ...this.options.marks.map((mark) => this.mark(mark, h)), ...this.lines.map((line) => this.line(line, w)));
    this.picture.replaceChildren(...up, ...across, inside, this.cursor);
    this.read(this.at);
    if (again && this.picture.clientHeight !== height) this.draw(false); // what is read took another line
  }

  grid(y, w) {
    const place = TOP + this.y(y);
    return svg("g", { class: "grid" }, svg("line", { x1: LEFT, x2: LEFT + w, y1: place, y2: place }), svg("text", { x: LEFT - 8, y: place + 4, "text-anchor": "end" }, this.axis(y)));
  }

  tick(x, h) {
    const last = LEFT + this.x(x) > this.picture.clientWidth - 24;
    return svg("text", { class: "tick", x: LEFT + this.x(x) + (last ? RIGHT : 0), y: TOP + h + 17, "text-anchor": last ? "end" : "middle" }, this.options.unit(x));
  }

  mark({ x, kind }, h) {
    return svg("line", { class: `mark ${kind}`, x1: this.x(x), x2: this.x(x), y1: 0, y2: h });
  }

  line({ hue, kind, points, faint, band }, w) {
    const path = (some) => thin(some, Math.ceil(w)).map(([x, y], index) => `${index ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
    const group = svg("g", { class: `line hue-${hue} ${kind ?? ""}` });
    if (band?.length > 1) group.append(svg("path", { class: "band", d: this.ribbon(band, w) }));
    if (faint) group.append(svg("path", { class: "faint", d: path(faint) }));
    group.append(svg("path", { d: path(points) }));
    if (points.length === 1 || (kind === "dots" && points.length <= FEWEST_POINTS)) {
      group.append(...points.map(([x, y]) => svg("circle", { cx: this.x(x).toFixed(1), cy: this.y(y).toFixed(1), r: 2.5 })));
    }
    if (points.length <= FEWEST_POINTS) group.append(...points.filter(bounded).map((point) => this.interval(point)));
    return group;
  }

  /* Along the lower edge and back along the upper one. */
  ribbon(band, w) {
    const every = Math.ceil(band.length / (2 * w));
    const some = band.filter((_, index) => index % every === 0 || index === band.length - 1);
    const at = (x, y) => `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
    return `M${[...some.map(([x, low]) => at(x, low)), ...some.reverse().map(([x, , high]) => at(x, high))].join("L")}Z`;
  }

  interval([x, , low, high]) {
    const [at, from, to] = [this.x(x), this.y(low), this.y(high)].map((place) => place.toFixed(1));
    return svg("path", { class: "interval", d: `M${at} ${from}V${to}M${at - 3} ${from}h6M${at - 3} ${to}h6` });
  }

  /** Show the values at `x` (null: the last ones) in words, and where they are. */
  read(x) {
    this.at = x;
    if (!this.lines.length || !this.cursor) return;
    const found = this.lines.map((line) => ({ ...line, point: x === null ? line.points.at(-1) : this.near(line.points, x) }));
    const value = ({ point }) => (point ? this.say(point[1]) : "–");
    const around = ({ point }) => (point && bounded(point) ? el("i", {}, `${this.axis(point[2])} to ${this.axis(point[3])}`) : "");
    const words = found.map((line) => el("span", { class: `reading hue-${line.hue} ${line.kind ?? ""}` }, line.name ? el("small", {}, line.name) : "", el("b", {}, value(line)), around(line)));
    this.readout.replaceChildren(...words);
    this.picture.setAttribute("aria-label", `${this.title}: ${found.map((line) => `${line.name} ${value(line)}`.trim()).join(", ")}`);
    this.cursor.replaceChildren();
    const labels = [...this.picture.querySelectorAll(".tick")];
    labels.forEach((tick) => tick.classList.remove("under"));
    if (x === null) return;
    const [place, foot, unit] = [LEFT + this.x(x), TOP + this.height, this.options.unit(x)];
    const half = 4 * unit.length + 6;
    const middle = Math.min(Math.max(place, LEFT + half), this.picture.clientWidth - half);
    labels.filter((tick) => Math.abs(tick.getAttribute("x") - middle) < half + 3 * tick.textContent.length).forEach((tick) => tick.classList.add("under"));
    this.cursor.append(
      svg("line", { x1: place, x2: place, y1: TOP, y2: foot }),
      ...found.filter(({ point }) => point).map(({ hue, point }) => svg("circle", { class: `hue-${hue}`, cx: LEFT + this.x(point[0]), cy: TOP + this.y(point[1]), r: 4 })),
      svg("rect", { x: middle - half, y: foot + 3, width: 2 * half, height: 18, rx: 5 }),
      svg("text", { x: middle, y: foot + 16, "text-anchor": "middle" }, unit),
    );
  }

  /* The point that speaks for `x`; none where the line has ended long before, or begins long after. */
  near(points, x) {
    const point = points[nearest(points, x)];
    return Math.abs(this.x(point[0]) - this.x(x)) < REACH ? point : null;
  }

  /* The x of the nearest point of the longest line: the pointer never stands between two steps. */
  under(event) {
    if (!this.lines.length) return null;
    const x = this.back(event.clientX - this.picture.getBoundingClientRect().left);
    const { points } = this.longest();
    return points[nearest(points, x)][0];
  }

  move(event) {
    if (event.key === "Escape") return this.look(null);
    const by = MOVES[event.key];
    if (by === undefined || !this.lines.length) return undefined;
    event.preventDefault();
    const { points } = this.longest();
    const from = this.at === null ? points.length - 1 : nearest(points, this.at);
    return this.look(points[Math.min(Math.max(from + by, 0), points.length - 1)][0]);
  }

  longest() {
    return this.lines.reduce((best, line) => (line.points.length > best.points.length ? line : best));
  }
}

function bounded([, , low, high]) {
  return Number.isFinite(low) && Number.isFinite(high);
}

/* The least and the most of some numbers. */
function span(numbers) {
  return numbers.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

/* The least and the most of nearly all points, judged by a thousand of them. */
function bulk(points) {
  const every = Math.ceil(points.length / 1000);
  const sorted = points.filter((_, index) => index % every === 0).map(([, y]) => y).sort((one, other) => one - other);
  return [0.02, 0.98].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
}

/* What the lines reach and most of the faint ones, with some air: those may leave the picture, or one outlier would
   flatten all. */
function heights(lines, log) {
  const edges = (some) => some.flatMap(([low, high]) => [low, high]);
  const around = lines.flatMap(({ points, band }) => edges([...points.filter(bounded), ...(band ?? [])].map((point) => point.slice(-2))));
  const [low, high] = span([...lines.flatMap(({ points, faint }) => [...span(points.map(([, y]) => y)), ...bulk(faint ?? points)]), ...around]);
  if (low === 0 && high === 0) return [-0.02, 0.1]; // nothing but zeros: a line that is seen above the foot
  if (log) return [low / 1.1, high * 1.1];
  const air = (high - low || Math.abs(high) || 1) * 0.12;
  return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
}
