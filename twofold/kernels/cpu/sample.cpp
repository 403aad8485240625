// From a row of logits to a token, without sorting the vocabulary.
//
//   logits ─▶ mask ─▶ allowed ─▶ bias ─▶ bans ─▶ penalties ─▶ greedy: the largest, lowest id
//                                              └▶ / temperature ─▶ weights ─▶ min-p ─▶ top-k ─▶ top-p ─▶ inverse CDF at u
//
// Cuts are floors under z = (logit - largest) / temperature, found on a ladder: RUNGS of equal height from z = 0 down, each
// with the count and the mass of its tokens. Only the rung where a cut falls is sorted. A cut keeps every token whose z
// equals that of the last one kept. A row is one thread's work, and a function of its own numbers alone.
#include "logsum.h"
#include "stages.h"

namespace {

constexpr int RUNGS = 2048;
constexpr int64_t STRIP = 256;
constexpr float DEEPEST = 32.0f;  // e^-32: what lies below shares the last rung

struct Ladder {
  int32_t count[RUNGS];
  double mass[RUNGS];
};

struct Room {  // scratch of a row
  float *x, *z, *w, *few;
  uint16_t* rung;
  double* strips;
  int32_t* times;
  Ladder* ladder;
};

template <class T>
T* carve(char*& from, int64_t count) {
  T* out = reinterpret_cast<T*>(from);
  from += (count * sizeof(T) + 63) / 64 * 64;
  return out;
}

Room room_for(Crew& crew, int64_t vocab) {
  const int64_t padded = divide_up(vocab, STRIP) * STRIP;
  char* at = crew.scratch->need<char>(size_t(padded) * (4 * 5 + 2) + size_t(padded / STRIP) * 8 + sizeof(Ladder) + 1024);
  Room room;
  room.x = carve<float>(at, padded), room.z = carve<float>(at, padded), room.w = carve<float>(at, padded);
  room.few = carve<float>(at, padded), room.rung = carve<uint16_t>(at, padded), room.times = carve<int32_t>(at, padded);
  room.strips = carve<double>(at, padded / STRIP), room.ladder = carve<Ladder>(at, 1);
  return room;
}

bool finite(const float* x, int64_t width) {
  V16 sum = all(0.0f);
  const V16 zero = all(0.0f);
  for (int64_t i = 0; i < width; i += LANES) sum = fma(load(x + i, int(std::min<int64_t>(LANES, width - i))), zero, sum);
  return total(sum) == 0.0f;
}

int32_t first_of(const float* x, int64_t width, float value) {
  for (int64_t at = 0; at < width; at += STRIP) {
    const int64_t count = std::min(STRIP, width - at);
    if (largest_of(x + at, count) < value) continue;
    for (int64_t i = at; i < at + count; i++)
      if (x[i] == value) return int32_t(i);
  }
  return 0;
}

// ------------------------------------------------------------------------------------------------ edits
// `times` is scratch [vocab]: how often an id was met.
void penalise(float* x, const Choice& it, int32_t* times) {
  if (it.repetition != 1.0f) {
    for (int32_t i = 0; i < it.seens; i++) times[it.seen[i]] = 0;
    for (int32_t i = 0; i < it.seens; i++) {
      const int32_t id = it.seen[i];
      if (times[id]++ == 0) x[id] = x[id] > 0.0f ? x[id] / it.repetition : x[id] * it.repetition;
    }
  }
  if (it.frequency == 0.0f && it.presence == 0.0f) return;
  for (int32_t i = 0; i < it.counts; i++) times[it.counted[i]] = 0;
  for (int32_t i = 0; i < it.counts; i++) times[it.counted[i]]++;
  for (int32_t i = 0; i < it.counts; i++) {
    const int32_t id = it.counted[i];
    if (times[id]) x[id] = (x[id] - it.frequency * float(times[id])) - it.presence;
    times[id] = 0;
  }
}

bool edits(const Choice& it) {
  return it.mask || it.allows || it.biases || it.bans || it.seens || it.counts;
}

// -infinity where a bit of the mask is not set.
void block(float* x, int64_t vocab, const uint32_t* mask) {
  for (int64_t at = 0; at < vocab; at += 32) {
    const uint32_t word = mask[at / 32];
    if (word == ~0u) continue;
    const int64_t end = std::min<int64_t>(at + 32, vocab);
    for (int64_t i = at; i < end; i++) x[i] = word >> (i - at) & 1 ? x[i] : -INFINITY;
  }
}

// The row's logits after its edits: the row itself where it has none.
const float* edited(const float* logits, int64_t vocab, const Choice& it, const Room& room) {
  if (!edits(it)) return logits;
  if (it.allows) {
    std::fill(room.x, room.x + vocab, -INFINITY);
    for (int32_t i = 0; i < it.allows; i++) room.x[it.allowed[i]] = logits[it.allowed[i]];
  } else {
    std::memcpy(room.x, logits, sizeof(float) * vocab);
  }
  if (it.mask) block(room.x, vocab, it.mask);
  for (int32_t i = 0; i < it.biases; i++) room.x[it.bias_ids[i]] = room.x[it.bias_ids[i]] + it.bias[i];
  for (int32_t i = 0; i < it.bans; i++) room.x[it.banned[i]] = -INFINITY;
  penalise(room.x, it, room.times);
  return room.x;
}

// ------------------------------------------------------------------------------------------------ cuts
float lowest_of(const float* z, int64_t vocab) {
  V16 low = all(INFINITY);
  int64_t i = 0;
  for (; i + LANES <= vocab; i += LANES) low = min(low, load(z + i));
  alignas(64) float lane[LANES];
  store(lane, low);
  float least = *std::min_element(lane, lane + LANES);
  for (; i < vocab; i++) least = std::min(least, z[i]);
  return least;
}

// Each token to its rung; each rung's count and mass of the tokens that have weight.
void climb(const Room& room, int64_t vocab) {
  const float depth = std::min(-lowest_of(room.z, vocab), DEEPEST);
  const V16 steps = all(depth > 1e-30f ? float(RUNGS - 1) / depth : 0.0f), last = all(float(RUNGS - 1));
  const V16 deep = all(2.0f * DEEPEST), zero = all(0.0f);
  std::memset(room.ladder, 0, sizeof(Ladder));
  alignas(64) float lane[LANES];
  for (int64_t i = 0; i < vocab; i += LANES) {
    store(lane, min(last, min(deep, zero - load(room.z + i)) * steps));
    for (int j = 0; j < LANES; j++) room.rung[i + j] = uint16_t(int32_t(lane[j]));
    for (int j = 0; j < LANES; j++) {
      const float weight = room.w[i + j];
      room.ladder->count[room.rung[i + j]] += weight > 0.0f;
      room.ladder->mass[room.rung[i + j]] += double(weight);
    }
  }
}

// The z of the tokens on a rung that have weight and are not under the floor, by id; how many.
int64_t gather(const Room& room, int64_t vocab, int rung, float floor) {
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; i++)
    if (room.rung[i] == rung && room.w[i] > 0.0f && room.z[i] >= floor) room.few[count++] = room.z[i];
  return count;
}

bool heavier(float a, float b) { return a > b; }

// The z of the k-th heaviest token, -infinity when fewer are left; `rung` becomes the rung that it lies on.
float floor_of_k(const Room& room, int64_t vocab, int64_t k, int& rung) {
  for (rung = 0; rung < RUNGS; rung++) {
    const int64_t here = room.ladder->count[rung];
    if (here >= k) {
      const int64_t count = gather(room, vocab, rung, -INFINITY);
      std::nth_element(room.few, room.few + (k - 1), room.few + count, heavier);
      return room.few[k - 1];
    }
    k -= here;
  }
  rung = RUNGS - 1;
  return -INFINITY;
}

// The z of the last token of the smallest set, heaviest first, that has `share` of the mass from `floor` up; the floor lies
// on the rung `lowest`. Whole rungs are taken while they fall short, then tokens of one rung, one after another.
float floor_of_share(const Room& room, int64_t vocab, double share, float floor, int lowest) {
  double* mass = room.ladder->mass;
  if (floor > -INFINITY) {
    const int64_t count = gather(room, vocab, lowest, floor);
    mass[lowest] = 0.0;
    for (int64_t i = 0; i < count; i++) mass[lowest] += double(exp_one(room.few[i]));
  }
  double whole = 0.0, part = 0.0;
  for (int rung = 0; rung <= lowest; rung++) whole += mass[rung];
  const double wanted = share * whole;
  int rung = 0;
  for (; rung < lowest && part + mass[rung] < wanted; rung++) part += mass[rung];
  const int64_t count = gather(room, vocab, rung, floor);
  std::sort(room.few, room.few + count, heavier);
  for (int64_t i = 0; i < count; i++)
    if ((part += double(exp_one(room.few[i]))) >= wanted) return room.few[i];
  return count ? room.few[count - 1] : floor;
}

// z = (x - most) / temperature and weight e^z of the tokens that the cuts leave; -infinity and 0 of the others.
void weigh(const float* x, int64_t vocab, float most, const Choice& it, const Room& room) {
  const V16 heat = all(it.temperature), shift = all(most), zero = all(0.0f), least = all(it.min_p);
  for (int64_t i = 0; i < vocab; i += LANES) {
    const V16 z = (load_or_nothing(x + i, vocab - i) - shift) / heat, weight = exp(z);
    store(room.z + i, z);
    store(room.w + i, where_less(weight, least, zero, weight));
  }
  float floor = -INFINITY;
  int lowest = RUNGS - 1;
  const bool by_k = it.top_k > 0 && it.top_k < vocab, by_share = it.top_p < 1.0;
  if (by_k || by_share) climb(room, vocab);
  if (by_k) floor = floor_of_k(room, vocab, it.top_k, lowest);
  if (by_share) floor = floor_of_share(room, vocab, it.top_p, floor, lowest);
  const V16 under = all(floor), nothing = all(-INFINITY);
  for (int64_t i = 0; i < vocab; i += LANES) {
    const V16 z = load(room.z + i), weight = where_less(z, under, zero, load(room.w + i));
    store(room.w + i, weight);
    store(room.z + i, where_less(zero, weight, z, nothing));
  }
  std::fill(room.w + divide_up(vocab, LANES) * LANES, room.w + divide_up(vocab, STRIP) * STRIP, 0.0f);
}

// ------------------------------------------------------------------------------------------------ the draw
// Where the running sum of weights first exceeds u of the whole, strip by strip and then inside one; at the latest where it
// reaches its end, which rounding may make it.
int32_t pick(const Room& room, int64_t vocab, double u) {
  const int64_t strips = divide_up(vocab, STRIP);
  double whole = 0.0;
  for (int64_t s = 0; s < strips; s++) {
    double lane[8] = {};
    for (int64_t i = s * STRIP; i < (s + 1) * STRIP; i += 8)
      for (int j = 0; j < 8; j++) lane[j] += double(room.w[i + j]);
    whole += ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    room.strips[s] = whole;
  }
  const auto beyond = [](auto sums, int64_t count, double aim) {
    double end = sums(count - 1);
    for (int64_t i = 0; i < count; i++)
      if (sums(i) > aim || sums(i) >= end) return i;
    return count - 1;
  };
  const double aim = u * whole;
  const int64_t s = beyond([&](int64_t i) { return room.strips[i]; }, strips, aim);
  double inner[STRIP], sum = 0.0;
  for (int64_t i = 0; i < STRIP; i++) inner[i] = sum = sum + double(room.w[s * STRIP + i]);
  const double before = s ? room.strips[s - 1] : 0.0;
  return int32_t(s * STRIP + beyond([&](int64_t i) { return inner[i]; }, STRIP, aim - before));
}

// ------------------------------------------------------------------------------------------------ log-probabilities
// The token's own value and rank, and the `tops` largest of some weight; of equals, lower ids first.
void rank(const float* x, int64_t vocab, Choice& it) {
  const float own = it.logprob = x[it.token];
  int64_t above = 0;
  int32_t found = 0;
  for (int64_t at = 0; at < vocab; at += STRIP) {
    const int64_t count = std::min(STRIP, vocab - at);
    const float most = largest_of(x + at, count);
    if (most > own)
      for (int64_t i = at; i < at + count; i++) above += x[i] > own;
    if (!it.tops || most == -INFINITY || (found == it.tops && most <= it.top_values[found - 1])) continue;
    for (int64_t i = at; i < at + count; i++) {
      if (x[i] == -INFINITY || (found == it.tops && x[i] <= it.top_values[found - 1])) continue;
      int32_t place = found < it.tops ? found++ : found - 1;
      for (; place > 0 && it.top_values[place - 1] < x[i]; place--)
        it.top_values[place] = it.top_values[place - 1], it.top_ids[place] = it.top_ids[place - 1];
      it.top_values[place] = x[i], it.top_ids[place] = int32_t(i);
    }
  }
  it.rank = int32_t(above + 1), it.found = found;
}

// The same as log-probabilities.
void report(const float* x, int64_t vocab, Choice& it) {
  LogSum sum = NOTHING;
  take_in(sum, x, vocab);
  rank(x, vocab, it);
  it.logprob = log_probability(sum, it.logprob);
  for (int32_t i = 0; i < it.found; i++) it.top_values[i] = log_probability(sum, it.top_values[i]);
}

// Every token's log-probability.
const float* normalised(const float* logits, int64_t vocab, const Room& room) {
  LogSum sum = NOTHING;
  take_in(sum, logits, vocab);
  const double most = double(sum.most), shift = log_of(sum.sum);
  for (int64_t i = 0; i < vocab; i++) room.z[i] = float((double(logits[i]) - most) - shift);
  return room.z;
}

// The model's logits / temperature, whatever was edited or cut: the trainer's arithmetic (loss.cpp).
const float* tempered(const float* logits, int64_t vocab, float temperature, const Room& room) {
  if (temperature == 1.0f) return logits;
  const V16 heat = all(temperature);
  for (int64_t i = 0; i < vocab; i += LANES) store(room.z + i, load_or_nothing(logits + i, vocab - i) / heat);
  return room.z;
}

bool known(const Choice& it, int64_t vocab) {
  const auto within = [&](const int32_t* ids, int32_t count) {
    return std::all_of(ids, ids + count, [&](int32_t id) { return id >= 0 && id < vocab; });
  };
  return within(it.allowed, it.allows) && within(it.bias_ids, it.biases) && within(it.banned, it.bans) &&
         within(it.seen, it.seens) && within(it.counted, it.counts);
}

void choose(const float* logits, int64_t vocab, Choice& it, const Room& room) {
  it.found = 0, it.fault = Fault::none;
  if (it.report == Report::given) {
    if (it.token >= 0 && it.token < vocab) return report(logits, vocab, it);
    it.fault = Fault::unknown_id;
    return;
  }
  it.token = 0;
  if (!known(it, vocab)) it.fault = Fault::unknown_id;
  else if (!finite(logits, vocab)) it.fault = Fault::not_finite;
  if (it.fault != Fault::none) return;
  const bool beam = it.report == Report::beam;
  const float* x = edited(beam ? normalised(logits, vocab, room) : logits, vocab, it, room);
  const float most = largest_of(x, vocab);
  if (most == -INFINITY) {
    it.fault = Fault::nothing_left;
    return;
  }
  const bool greedy = it.temperature == 0.0f;
  if (!greedy) weigh(x, vocab, most, it, room);
  it.token = greedy ? first_of(x, vocab, most) : pick(room, vocab, it.u);
  if (beam) rank(x, vocab, it);
  if (it.report == Report::raw) report(logits, vocab, it);
  if (it.report == Report::processed) report(greedy ? x : room.z, vocab, it);
  if (it.report == Report::tempered) report(greedy ? logits : tempered(logits, vocab, it.temperature, room), vocab, it);
}

}  // namespace

void run(const Sample& it, Crew& crew) {
  const int64_t rows = it.choice_size == sizeof(Choice) ? *it.rows : 0;
  for (int64_t row; (row = crew.take()) < rows;)
    choose(it.logits + row * it.stride, it.vocab, it.choices[row], room_for(crew, it.vocab));
}

TF_STAGE(Sample)
