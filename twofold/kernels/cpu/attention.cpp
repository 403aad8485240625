// Each query looks back over its own sequence's cache: a walk over blocks of 128 keys at absolute positions.
//
//   a piece of work: rows of one key-value head         rows are (query, head of the group), up to ROWS of them
//   for each block:    s = q . keys                     a panel of 16 keys is loaded once for all rows
//                      m, l, p = exp(s - m)             cap, slopes and masks on the way
//                      o = p . values                   folded into the running (m, l, o) as online softmax does
//   at the end:        sink, o / l, m + log l
//
// A block's (m, l, o) starts from zero and is a function of the row and of the block; folding goes block after block. So
// a row has the same bits in a chunk of any size, in any company, on any number of threads, with blocks of any size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_tile.h"
#include "math.h"

namespace {

constexpr float NOTHING = -1e30f;        // the largest score of a row that has seen no key: finite, never makes a NaN
constexpr int ROWS = 96;                 // rows of a piece of work
constexpr int S_STRIDE = KEYS + LANES;   // not a power of two, so that rows do not share cache sets
constexpr int FEW = 2 * TILE;            // more rows than this: values (and what is not fp32) are unpacked once for all
const float PLACE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One query of one head.
struct Row {
  int64_t token;
  int32_t head, position;
};

// What a thread works in.
struct Desk {
  Row row[ROWS];
  alignas(64) float m[ROWS], l[ROWS];         // the walk so far
  alignas(64) float m_block[ROWS], l_block[ROWS], old[ROWS], fresh[ROWS];
  float *q, *s, *o, *keys, *values;           // [rows][q_stride], [rows][S_STRIDE], [rows][o_stride], unpacked panels
  int64_t q_stride, o_stride;
};

// Some tokens of one sequence; every kv head of them is `tiles` pieces of work.
struct Job {
  int32_t span, tiles;
  int64_t rows, cost;
};

struct Plan {
  std::vector<Job> jobs;
  std::vector<int64_t> first;  // the number of each job's first piece
};

// Largest first, so that the last pieces are small ones.
void make_plan(const Attention& it, int threads, Plan& plan) {
  const Step& step = *it.step;
  const int64_t group = it.heads / it.cache.kv_heads;
  int64_t most = ROWS, pieces = 0;
  for (;; most /= 2) {
    pieces = 0;
    for (int s = 0; s < step.spans; s++) pieces += divide_up((step.first[s + 1] - step.first[s]) * group, most);
    if (pieces * it.cache.kv_heads >= 3 * threads || most / 2 < 2 * TILE) break;
  }
  plan.jobs.clear(), plan.first.assign(1, 0);
  for (int s = 0; s < step.spans; s++) {
    const int64_t count = step.first[s + 1] - step.first[s], rows = count * group, tiles = divide_up(rows, most);
    const int64_t seen = it.window ? std::min<int64_t>(it.window, step.start[s] + count) : step.start[s] + count;
    if (count) plan.jobs.push_back({s, int32_t(tiles), rows, seen * divide_up(rows, tiles)});
  }
  std::stable_sort(plan.jobs.begin(), plan.jobs.end(), [](const Job& a, const Job& b) { return a.cost > b.cost; });
  for (const Job& job : plan.jobs) plan.first.push_back(plan.first.back() + int64_t(job.tiles) * it.cache.kv_heads);
}

// Panels of one block of keys and values, as they lie in the cache.
template <class T>
struct Block {
  const T *key[PANELS], *value[PANELS];
  int64_t start;
  int panels;

  Block(const Cache& cache, const int32_t* table, int head, int64_t start, int64_t end) : start(start) {
    panels = int(divide_up(std::min<int64_t>(KEYS, end - start), PANEL));
    for (int i = 0; i < panels; i++) {
      const int64_t row = cache_row(cache, table, start + i * PANEL, head);
      key[i] = static_cast<const T*>(cache.keys) + row * key_width(cache);
      value[i] = static_cast<const T*>(cache.values) + row * cache.dim;
    }
  }
};

// Keys of a block that a row sees: [first, last).
struct Sight {
  int first, last;
  Sight(const Attention& it, const Row& row, int64_t start) {
    first = it.window ? int(std::clamp<int64_t>(row.position - it.window + 1 - start, 0, KEYS)) : 0;
    last = int(std::clamp<int64_t>(row.position + 1 - start, 0, KEYS));
  }
};

// A row's raw scores of the keys [first, last) of a block, both multiples of 16, become exp(score - m); sets m and l.
void soften(const Attention& it, const Row& row, int64_t start, int first, int last, float* s, float* m, float* l) {
  const Sight sight(it, row, start);
  const V16 cap = all(it.softcap), place = load(PLACE);
  const float slope = it.slopes ? it.slopes[row.head] : 0.0f;
  V16 top = all(NOTHING);
  for (int i = first; i < last; i += LANES) {
    V16 x = load(s + i);
    if (it.softcap != 0.0f) x = cap * tanh(x / cap);
    if (it.slopes) x = x + all(slope) * (place + all(float(start + i - row.position)));
    if (i < sight.first || i + LANES > sight.last) {
      const V16 hidden = all(-INFINITY);
      x = where_less(place, all(float(sight.last - i)), x, hidden);
      x = where_less(place, all(float(sight.first - i)), hidden, x);
    }
    top = max(top, x);
    store(s + i, x);
  }
  *m = largest(top);
  const V16 high = all(*m);
  V16 sum = all(0.0f);
  for (int i = first; i < last; i += LANES) {
    const V16 p = exp(load(s + i) - high);
    sum = sum + p;
    store(s + i, p);
  }
  *l = total(sum);
}

// Folds the scalars of a block into the walk: how much of the old and of the fresh remains.
void fold(Desk& desk, int first, int last) {
  for (int i = first; i < last; i += LANES) {
    const int count = last - i;
    const V16 m = load(desk.m + i, count), m_block = load(desk.m_block + i, count), top = max(m, m_block);
    const V16 old = exp(m - top), fresh = exp(m_block - top);
    store(desk.l + i, load(desk.l + i, count) * old + load(desk.l_block + i, count) * fresh, count);
    store(desk.m + i, top, count);
    store(desk.old + i, old, count);
    store(desk.fresh + i, fresh, count);
  }
}

// Rows `first` to `last` of the desk in register tiles of like size, each with the keys that any of its rows sees.
struct RowTiles {
  int count, at[ROWS + 1], first[ROWS], last[ROWS];

  RowTiles(const Attention& it, const Desk& desk, int from, int to, int64_t start) {
    count = int(divide_up(to - from, TILE));
    for (int t = 0; t <= count; t++) at[t] = from + (to - from) * t / count;
    for (int t = 0; t < count; t++) {
      first[t] = KEYS, last[t] = 0;
      for (int r = at[t]; r < at[t + 1]; r++) {
        const Sight sight(it, desk.row[r], start);
        first[t] = std::min(first[t], sight.first / PANEL * PANEL);
        last[t] = std::max(last[t], sight.last);
      }
    }
  }
  int rows(int t) const { return at[t + 1] - at[t]; }
  int panels(int t) const { return int(divide_up(last[t], PANEL)); }
};

template <class T>
const Tiles<T> tiles_of{};

template <class T>
void score_block(const Attention& it, Desk& desk, const RowTiles& tiles, const T* const* key, int panels, Ahead& ahead) {
  Ahead none;
  const int wide = wide_for(tiles.rows(0));
  for (int p = 0; p < panels;) {
    const bool many = p + wide <= panels;
    for (int t = 0; t < tiles.count; t++) {
      if (p >= tiles.panels(t) || (p + (many ? wide : 1)) * PANEL <= tiles.first[t]) continue;
      const Scores job{desk.q + tiles.at[t] * desk.q_stride, desk.q_stride, it.cache.dim,
                       desk.s + tiles.at[t] * S_STRIDE + p * PANEL, S_STRIDE};
      (many ? tiles_of<T>.wide_score : tiles_of<T>.one_score)[tiles.rows(t) - 1](job, key + p, t ? none : ahead);
    }
    p += many ? wide : 1;
  }
}

// Values [keys][dim] of a block, or unpacked [dim / 16][KEYS][16]: `step` from a column to the next, `width` from key to key.
template <class T>
void value_block(const Attention& it, Desk& desk, const RowTiles& tiles, const T* const* value, int64_t step, int64_t width,
                 Ahead& ahead) {
  Ahead none;
  const int dim = it.cache.dim, columns = int(divide_up(dim, LANES)), wide = wide_for(tiles.rows(0));
  const bool packed = step == LANES;  // then the last column ends where the row ends, and overlaps the one before
  for (int c = 0; c < columns;) {
    const bool many = c + wide <= columns;
    int64_t from[4], to[4];
    for (int i = 0; i < (many ? wide : 1); i++) {
      to[i] = packed ? std::min<int64_t>((c + i) * LANES, dim - LANES) : (c + i) * LANES;
      from[i] = packed ? to[i] : (c + i) * step;
    }
    for (int t = 0; t < tiles.count; t++) {
      const int r = tiles.at[t];
      const Values job{desk.s + r * S_STRIDE, S_STRIDE, tiles.first[t], tiles.last[t], width,
                       desk.old + r, desk.fresh + r, desk.o + r * desk.o_stride, desk.o_stride};
      (many ? tiles_of<T>.wide_value : tiles_of<T>.one_value)[tiles.rows(t) - 1](job, value, from, to, t ? none : ahead);
    }
    c += many ? wide : 1;
  }
}

// A block's keys as fp32 panels.
template <class T>
void unpack_keys(const Block<T>& block, int dim, float* to) {
  for (int i = 0; i < block.panels; i++)
    for (int d = 0; d < dim; d++) store(to + (int64_t(i) * dim + d) * PANEL, widened(block.key[i] + d * PANEL));
}

// A block's first `keys` values as fp32 columns of sixteen numbers, zero past the head's size.
template <class T>
void unpack_values(const Block<T>& block, int keys, int dim, float* to) {
  for (int key = 0; key < keys; key++) {
    const T* from = block.value[key / PANEL] + int64_t(key % PANEL) * dim;
    float* line = to + key * LANES;
    int d = 0;
    for (; d + LANES <= dim; d += LANES) store(line + d * KEYS, widened(from + d));
    if (d == dim) continue;
    alignas(64) T part[LANES] = {};
    std::memcpy(part, from + d, sizeof(T) * (dim - d));
    store(line + d * KEYS, widened(part));
  }
}

// Rows [first, last) of the desk walk over the blocks of `table` that hold keys [begin, end).
template <class T>
void walk(const Attention& it, Desk& desk, int head, const int32_t* table, int first, int last, int64_t begin, int64_t end) {
  const Cache& cache = it.cache;
  const int dim = cache.dim;
  const bool unpacked = last - first > FEW || dim < LANES;
  for (int64_t start = begin; start < end; start += KEYS) {
    while (first < last && desk.row[first].position < start) first++;  // they stand before these keys and see none
    const Block<T> block(cache, table, head, start, end);
    const Block<T> after(cache, table, head, start + KEYS, std::max(end, start + KEYS));
    const RowTiles tiles(it, desk, first, last, start);
    Ahead values{reinterpret_cast<const char* const*>(block.value), block.panels, int64_t(sizeof(T)) * PANEL * dim, 0};
    Ahead keys{reinterpret_cast<const char* const*>(after.key), after.panels, int64_t(sizeof(T)) * PANEL * dim, 0};
    const float* panel[PANELS];
    if (unpacked && sizeof(T) != sizeof(float)) {
      unpack_keys(block, dim, desk.keys);
      for (int i = 0; i < block.panels; i++) panel[i] = desk.keys + int64_t(i) * dim * PANEL;
      score_block<float>(it, desk, tiles, panel, block.panels, values);
    } else {
      score_block<T>(it, desk, tiles, block.key, block.panels, values);
    }
    for (int t = 0; t < tiles.count; t++)
      for (int r = tiles.at[t]; r < tiles.at[t + 1]; r++)
        soften(it, desk.row[r], start, tiles.first[t], tiles.panels(t) * PANEL, desk.s + r * S_STRIDE, &desk.m_block[r],
               &desk.l_block[r]);
    fold(desk, first, last);
    if (unpacked) {
      unpack_values(block, int(std::min<int64_t>(KEYS, end - start)), dim, desk.values);
      for (int i = 0; i < block.panels; i++) panel[i] = desk.values + i * PANEL * LANES;
      value_block<float>(it, desk, tiles, panel, int64_t(KEYS) * LANES, LANES, keys);
    } else {
      value_block<T>(it, desk, tiles, block.value, LANES, dim, keys);
    }
  }
}

// Queries of the desk's rows, scaled, from [tokens][heads * dim]; and walks that have seen nothing.
void sit_down(const Attention& it, Desk& desk, int rows) {
  const int dim = it.cache.dim;
  for (int r = 0; r < rows; r++) {
    const float* q = it.q + desk.row[r].token * it.q_stride + int64_t(desk.row[r].head) * dim;
    for (int d = 0; d < dim; d += LANES)
      store(desk.q + r * desk.q_stride + d, load(q + d, dim - d) * all(it.scale));
    desk.m[r] = NOTHING, desk.l[r] = 0.0f;
  }
  std::fill_n(desk.o, rows * desk.o_stride, 0.0f);
}

// The rows' results: a sink is one more score, without a value.
void stand_up(const Attention& it, Desk& desk, int rows) {
  const int dim = it.cache.dim;
  for (int r = 0; r < rows; r++) {
    const Row& row = desk.row[r];
    float m = desk.m[r], l = desk.l[r];
    V16 keep = all(1.0f);
    if (it.sinks) {
      const float sink = it.sinks[row.head], top = sink > m ? sink : m, old = exp_one(m - top);
      l = l * old + exp_one(sink - top);
      m = top, keep = all(old);
    }
    float* out = it.out + row.token * it.out_stride + int64_t(row.head) * dim;
    for (int d = 0; d < dim; d += LANES) store(out + d, load(desk.o + r * desk.o_stride + d) * keep / all(l), dim - d);
    if (it.lse) it.lse[row.token * it.heads + row.head] = m + float(std::log(double(l)));
  }
}

template <class T>
void do_piece(const Attention& it, Desk& desk, const Job& job, int64_t number) {
  const Step& step = *it.step;
  const int group = it.heads / it.cache.kv_heads, head = int(number % it.cache.kv_heads);
  const int64_t tile = job.tiles - 1 - number / it.cache.kv_heads;  // the last rows see the most keys
  const int64_t from = job.rows * tile / job.tiles, to = job.rows * (tile + 1) / job.tiles;
  const int rows = int(to - from);
  for (int r = 0; r < rows; r++) {
    const int64_t query = (from + r) / group;
    desk.row[r] = {step.first[job.span] + query, int32_t(head * group + (from + r) % group), int32_t(step.start[job.span] + query)};
  }
  sit_down(it, desk, rows);
  const int64_t oldest = it.window ? std::max(0, desk.row[0].position - it.window + 1) : 0;
  walk<T>(it, desk, head, step.table + int64_t(job.span) * step.table_stride, 0, rows, oldest / KEYS * KEYS,
          desk.row[rows - 1].position + 1);
  stand_up(it, desk, rows);
}

// Divides up a thread's scratch memory.
void lay_out(const Attention& it, Crew& crew, Desk& desk) {
  const int64_t dim = it.cache.dim, whole = divide_up(dim, LANES) * LANES;
  desk.q_stride = desk.o_stride = whole + LANES;
  desk.q = crew.scratch->need<float>(ROWS * (2 * desk.q_stride + S_STRIDE) + 2 * KEYS * whole);
  desk.o = desk.q + ROWS * desk.q_stride;
  desk.s = desk.o + ROWS * desk.o_stride;
  desk.keys = desk.s + ROWS * S_STRIDE;
  desk.values = desk.keys + KEYS * whole;
}

thread_local Plan plan;
thread_local Desk desk;

}  // namespace

void run(const Attention& it, Crew& crew) {
  if (!it.step->tokens) return;
  make_plan(it, crew.threads, plan);
  lay_out(it, crew, desk);
  for (int64_t i; (i = crew.take()) < plan.first.back();) {
    const size_t which = std::upper_bound(plan.first.begin(), plan.first.end(), i) - plan.first.begin() - 1;
    const int64_t number = i - plan.first[which];
    if (it.cache.type == Type::bf16) do_piece<uint16_t>(it, desk, plan.jobs[which], number);
    else do_piece<float>(it, desk, plan.jobs[which], number);
  }
}

TF_STAGE(Attention)
