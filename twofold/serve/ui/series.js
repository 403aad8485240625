/* Numbers along a run: smoothed, thinned to what a picture can show, and said in few digits. Nothing here draws. */

/**
 * The exponential mean of `ys` with `weight` in [0, 1), begun without a pull towards zero (Adam's correction).
 * A number that is none (null) stays one and moves nothing.
 */
export function smooth(ys, weight) {
  let mean = 0;
  let sum = 0;
  return ys.map((y) => {
    if (y === null) return null;
    mean = weight * mean + (1 - weight) * y;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}

/** Of many points [x, y] the first, lowest, highest and last in each of `slots` equal parts of the way, in order. */
export function thin(points, slots) {
  if (points.length <= 4 * slots) return points;
  const begin = points[0][0];
  const width = (points.at(-1)[0] - begin) / slots || 1;
  const kept = [];
  let at = 0;
  while (at < points.length) {
    const slot = Math.floor((points[at][0] - begin) / width);
    let [low, high, end] = [at, at, at];
    while (end + 1 < points.length && Math.floor((points[end + 1][0] - begin) / width) === slot) {
      end += 1;
      if (points[end][1] < points[low][1]) low = end;
      if (points[end][1] > points[high][1]) high = end;
    }
    kept.push(...[...new Set([at, low, high, end])].sort((one, other) => one - other).map((index) => points[index]));
    at = end + 1;
  }
  return kept;
}

/** The index of the point whose x is nearest; `points` rise in x. */
export function nearest(points, x) {
  let [low, high] = [0, points.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - points[low - 1][0] <= points[low][0] - x ? low - 1 : low;
}

/** What a round number of bytes is counted in. */
export const binary = (high) => (high < 2 ** 30 ? 2 ** 20 : 2 ** 30);

/** Round numbers of `unit` from `low` to `high`, about `count` of them. */
export function ticks(low, high, count, unit = 1) {
  if (unit !== 1) return ticks(low / unit, high / unit, count).map((tick) => tick * unit);
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((times) => times * power >= rough) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

/** Round numbers for a logarithmic axis: powers of ten, with 2 and 5 between few of them. */
export function logTicks(low, high, count) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) powers.push(10 ** power);
  if (powers.length < 2 || high / low < 8) return ticks(low, high, count).filter((tick) => tick > 0);
  const times = powers.length <= count / 2 ? [1, 2, 5] : [1];
  return powers.flatMap((power) => times.map((by) => Number((by * power).toPrecision(3)))).filter((tick) => tick >= low && tick <= high);
}

/** The middle of some numbers; NaN of none. */
export function median(numbers) {
  const sorted = [...numbers].sort((one, other) => one - other);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

const digits = (most, least = 1) => new Intl.NumberFormat("en", { maximumSignificantDigits: most, minimumSignificantDigits: least });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const [short, long] = [digits(3), digits(5, 5)];

/** A number as it is read: 2.3576, 0.00075 as 7.5e-4, 14200 as 14.2k. */
export function number(value, format = short) {
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return "not a number";
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1e9) return `${short.format(value / 1e9)}B`;
  if (size >= 1e6) return `${short.format(value / 1e6)}M`;
  if (size >= 1e4) return `${short.format(value / 1e3)}k`;
  return format.format(value);
}

export const precise = (value) => number(value, long);
export const count = (value) => whole.format(value);
export const percent = (value) => `${short.format(100 * value)}%`;
export const gibibytes = (value) => (value < 2 ** 30 ? `${short.format(value / 2 ** 20)} MiB` : `${short.format(value / 2 ** 30)} GiB`);

/** What round times are counted in on an axis so many seconds long: seconds, minutes, hours or days. */
export const unitOfTime = (seconds) => [86400, 3600, 60].find((unit) => seconds > 3 * unit) ?? 1;

/** Seconds as `most` of their units at most: 48 s, 3 min 20 s, 5 h 2 min, 4 d. */
export function duration(seconds, most = 2) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const rounded = Math.max(0, Math.round(seconds));
  const at = Math.max(0, units.findIndex(([, size]) => rounded >= size));
  if (rounded === 0) return "0 s";
  const parts = [];
  let left = rounded;
  for (const [name, size] of units.slice(at, at + most)) {
    const many = Math.floor(left / size);
    left -= many * size;
    if (many) parts.push(`${many} ${name}`);
  }
  return parts.join(" ");
}
