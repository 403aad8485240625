// The walk of some rows of one key-value head over blocks of 128 keys at absolute positions.
//
//   for each block:    s = q . keys                     a panel of 16 keys is loaded once for all rows
//                      m, l, p = exp(s - m)             cap, slopes and masks on the way
//                      o = p . values                   folded into the running (m, l, o) as online softmax does
//   at the end:        sink, o / l, m + log l
//
// Blocks and panels of which no row sees anything are passed over.
// A block's (m, l, o) starts from zero and is a function of the row and of the block; folding goes block after block.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention_tile.h"
#include "math.h"
#include "whole.h"

namespace {
constexpr float NOTHING = -1e30f;        // the largest score of a row that has seen no key: finite, never makes a NaN
constexpr int ROWS = 96;                 // rows that walk together
constexpr int MANY = 2 * TILE + 1;       // rows for which keys that are not fp32 are unpacked, once for all

// One query of one head.
struct Row {
  int64_t token;
  int32_t head, position;
  const uint8_t* layout;  // see Sparse; null: every key is there
  Reach reach;
};

// What a thread works in.
struct Desk {
  Row row[ROWS];
  alignas(64) float m[ROWS], l[ROWS];          // the walk so far
  alignas(64) float m_block[ROWS], l_block[ROWS], old[ROWS], fresh[ROWS];
  alignas(64) float q_scale[ROWS];             // queries as bytes: their scales, and the sums of their codes
  int32_t q_sum[ROWS];
  float *q, *s, *o, *keys, *values;            // [rows][q_stride], [rows][S_STRIDE], [rows][o_stride], unpacked panels
  int8_t* codes;                               // [rows][code_stride]
  int64_t q_stride, o_stride, code_stride;
};

// Divides up a thread's scratch memory.
inline void lay_out(const Attention& it, Crew& crew, Desk& desk) {
  const int64_t dim = it.cache.dim, whole = divide_up(dim, LANES) * LANES;
  desk.q_stride = desk.o_stride = whole + LANES;
  desk.code_stride = whole + 64;
  desk.q = crew.scratch->need<float>(ROWS * (2 * desk.q_stride + S_STRIDE + desk.code_stride / 4) + 2 * KEYS * whole);
  desk.o = desk.q + ROWS * desk.q_stride;
  desk.s = desk.o + ROWS * desk.o_stride;
  desk.keys = desk.s + ROWS * S_STRIDE;
  desk.values = desk.keys + KEYS * whole;
  desk.codes = reinterpret_cast<int8_t*>(desk.values + KEYS * whole);
}

// What some rows of the desk see of each block, whoever of them.
struct View {
  const uint8_t* layout[ROWS];
  int count = 0;  // of different layouts; none: everything is there

  View(const Desk& desk, int first, int last) {
    for (int r = first; r < last; r++) {
      const uint8_t* own = desk.row[r].layout;
      if (own && std::find(layout, layout + count, own) == layout + count) layout[count++] = own;
    }
  }
  unsigned panels(int64_t start) const {
    if (!count) return ALL_PANELS;
    unsigned any = 0;
    for (int i = 0; i < count; i++) any |= layout[i][start / KEYS];
    return any;
  }
  // The first block from `start` on that is seen; `end` or more when there is none.
  int64_t next(int64_t start, int64_t end) const {
    while (start < end && !panels(start)) start += KEYS;
    return start;
  }
};

// The keys of one head of one sequence, which end at `end`, and what the rows that look see of them.
struct Past {
  int head;
  const int32_t* table;
  int64_t end;
  const View& view;
};

// Panels of one block of keys and values, as they lie in the cache.
template <class T>
struct Block {
  const T *key[PANELS], *value[PANELS];
  const float *key_scale[PANELS], *value_scale[PANELS];
  int panels;

  Block(const Cache& cache, const Past& past, int64_t start) {
    panels = int(divide_up(std::clamp<int64_t>(past.end - start, 0, KEYS), PANEL));
    for (int i = 0; i < panels; i++) {
      const int64_t row = cache_row(cache, past.table, start + i * PANEL, past.head);
      key[i] = static_cast<const T*>(cache.keys) + row * key_width(cache);
      value[i] = static_cast<const T*>(cache.values) + row * cache.dim;
      if (sizeof(T) == 1) key_scale[i] = cache.key_scales + row, value_scale[i] = cache.value_scales + row;
    }
  }
};

// Rows [from, to) of the desk in register tiles of like size, each with the keys that any of its rows sees.
struct RowTiles {
  int count, at[ROWS + 1], first[ROWS], last[ROWS];
  unsigned seen[ROWS], all = 0;  // panels that any row of a tile sees, and of any tile

  RowTiles(const Attention& it, const Desk& desk, int from, int to, int64_t start) {
    count = int(divide_up(to - from, TILE));
    for (int t = 0; t <= count; t++) at[t] = from + (to - from) * t / count;
    for (int t = 0; t < count; t++) {
      unsigned there = 0;
      first[t] = KEYS, last[t] = 0;
      for (int r = at[t]; r < at[t + 1]; r++) {
        const Sight sight(desk.row[r].reach, desk.row[r].layout, start);
        first[t] = std::min(first[t], sight.first / PANEL * PANEL);
        last[t] = std::max(last[t], sight.last);
        there |= sight.there;
      }
      all |= seen[t] = there & panels_of(first[t], last[t]);
    }
  }
  int rows(int t) const { return at[t + 1] - at[t]; }
  int panels(int t) const { return int(divide_up(last[t], PANEL)); }
  bool idle(int t, int panel, int wide) const { return !(seen[t] >> panel & ((1u << wide) - 1)); }
};

// Scores of whole numbers: keys and query are bytes with scales; the sums are exact.
struct ByteScores {
  const int8_t* q;        // [rows][q_stride]
  int64_t q_stride;
  int width;              // numbers of a key, whole groups of four
  const float* q_scale;   // [rows]
  const int32_t* q_sum;   // [rows] sums of the codes
  float* s;               // [rows][s_stride], 16 for each panel
  int64_t s_stride;
};

template <int M>
void score_bytes_tile(const ByteScores& it, const int8_t* panel, const float* key_scale) {
  I16 c[M];
  whole_sums<8>(c, it.q, it.q_stride, reinterpret_cast<const uint8_t*>(panel), it.width);
  const V16 scale = load(key_scale);
  TF_UNROLL for (int m = 0; m < M; m++) {
    const V16 sum = to_float(c[m] - all_whole(LIFT<8> * it.q_sum[m]));
    store(it.s + m * it.s_stride, sum * scale * all(it.q_scale[m]));
  }
}

struct ByteTiles {
  using Score = void (*)(const ByteScores&, const int8_t*, const float*);
  Score score[TILE];

  constexpr ByteTiles() : ByteTiles(std::make_integer_sequence<int, TILE>()) {}

 private:
  template <int... M>
  constexpr explicit ByteTiles(std::integer_sequence<int, M...>) : score{score_bytes_tile<M + 1>...} {}
};

constexpr ByteTiles byte_tiles{};

template <class T>
void score_block(const Attention& it, Desk& desk, const RowTiles& tiles, const T* const* key, int panels, Ahead& ahead) {
  Ahead none;
  for (int p = 0; p < panels;) {
    const int most = wide_for(tiles.rows(0)), wide = p + most <= panels ? most : 1;
    const auto& tile = wide == most ? score_tiles<T>.wide : score_tiles<T>.one;
    for (int t = 0; t < tiles.count; t++) {
      if (tiles.idle(t, p, wide)) continue;
      const Scores job{desk.q + tiles.at[t] * desk.q_stride, desk.q_stride, it.cache.dim,
                       desk.s + tiles.at[t] * S_STRIDE + p * PANEL, S_STRIDE};
      tile[tiles.rows(t) - 1](job, key + p, t ? none : ahead);
    }
    p += wide;
  }
}

void score_bytes(const Attention& it, Desk& desk, const RowTiles& tiles, const Block<int8_t>& block, Ahead& ahead) {
  for (int p = 0; p < block.panels; p++) {
    ahead.next(it.cache.dim / 4);
    for (int t = 0; t < tiles.count; t++) {
      const int r = tiles.at[t];
      if (tiles.idle(t, p, 1)) continue;
      const ByteScores job{desk.codes + r * desk.code_stride, desk.code_stride, int(key_width(it.cache)), desk.q_scale + r,
                           desk.q_sum + r, desk.s + r * S_STRIDE + p * PANEL, S_STRIDE};
      byte_tiles.score[tiles.rows(t) - 1](job, block.key[p], block.key_scale[p]);
    }
  }
}

// A row's raw scores of the keys [first, last) of a block, both multiples of 16, become exp(score - m); sets m and l.
// Values that are bytes have scales, which go into the weights; scores of e4m3 keys are still to be scaled.
void soften(const Attention& it, const Row& row, int64_t start, int first, int last, const float* const* key_scale,
            const float* const* value_scale, float* s, float* m, float* l) {
  const Sight sight(row.reach, row.layout, start);
  const float* slope = it.slopes ? it.slopes + row.head : nullptr;
  V16 top = all(NOTHING);
  for (int i = first; i < last; i += LANES) {
    V16 x = load(s + i);
    if (key_scale) x = x * load(key_scale[i / LANES]);
    if (it.softcap != 0.0f) x = all(it.softcap) * tanh(x / all(it.softcap));
    x = biased(x, slope, start + i - row.position, sight, i);
    top = max(top, x);
    store(s + i, x);
  }
  *m = largest(top);
  const V16 high = all(*m);
  V16 sum = all(0.0f);
  for (int i = first; i < last; i += LANES) {
    const V16 p = exp(load(s + i) - high);
    sum = sum + p;
    store(s + i, value_scale ? p * load(value_scale[i / LANES]) : p);
  }
  *l = total(sum);
}

// Folds the scalars of a block into the walk: how much of the old and of the fresh remains.
inline void fold(Desk& desk, int first, int last) {
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

// Where a block's weighted values go: folded into the walk, or kept apart.
struct Into {
  float* o;  // [rows][stride]
  int64_t stride;
  bool apart;
};

// Weighted values of a block, whose values were unpacked to [dim / 16][KEYS][16].
inline void value_block(const Attention& it, Desk& desk, const RowTiles& tiles, const Into& into, Ahead& ahead) {
  Ahead none;
  const int columns = int(divide_up(it.cache.dim, LANES)), most = wide_for(tiles.rows(0));
  const float* page[PANELS];
  for (int i = 0; i < PANELS; i++) page[i] = desk.values + i * PANEL * LANES;
  for (int c = 0; c < columns;) {
    const int wide = c + most <= columns ? most : 1;
    const auto& tile = wide == most ? value_tiles.wide : value_tiles.one;
    int64_t from[4], to[4];
    for (int i = 0; i < wide; i++) to[i] = (c + i) * LANES, from[i] = (c + i) * int64_t(KEYS) * LANES;
    for (int t = 0; t < tiles.count; t++) {
      const int r = tiles.at[t];
      const Values job{desk.s + r * S_STRIDE, S_STRIDE, 1, tiles.first[t], tiles.last[t], LANES,
                       into.apart ? nullptr : desk.old + r, desk.fresh + r, into.o + r * into.stride, into.stride,
                       tiles.seen[t]};
      tile[tiles.rows(t) - 1](job, page, from, to, t ? none : ahead);
    }
    c += wide;
  }
}

// The same for a few rows, from the values where they lie.
template <class T>
void stream_block(const Attention& it, Desk& desk, const RowTiles& tiles, const T* const* value, const Into& into,
                  Ahead& ahead) {
  const int r = tiles.at[0], columns = it.cache.dim / LANES;
  const Values job{desk.s + r * S_STRIDE, S_STRIDE, 1, tiles.first[0], tiles.last[0], it.cache.dim,
                   into.apart ? nullptr : desk.old + r, desk.fresh + r, into.o + r * into.stride, into.stride, tiles.all};
  switch (tiles.rows(0)) {
    case 1: return value_stream<1>(job, value, columns, desk.values, ahead);
    case 2: return value_stream<2>(job, value, columns, desk.values, ahead);
    default: return value_stream<3>(job, value, columns, desk.values, ahead);
  }
}

// A block's keys that are seen, as fp32 panels.
template <class T>
void unpack_keys(const Block<T>& block, unsigned seen, int dim, float* to) {
  for (int i = 0; i < block.panels; i++)
    for (int d = 0; d < dim && seen >> i & 1; d++)
      store(to + (int64_t(i) * dim + d) * PANEL, widened(block.key[i] + d * PANEL));
}

// Those of a block's first `keys` values that are seen, as fp32 columns of sixteen numbers, zero past the head's size.
template <class T>
void unpack_values(const Block<T>& block, unsigned seen, int keys, int dim, float* to) {
  for (int key = 0; key < keys; key++) {
    if (!(seen >> key / PANEL & 1)) continue;
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

// Of the first `count` panels those in `seen`, to be asked for.
template <class T>
struct Wanted {
  const T* panel[PANELS];
  Ahead ahead;

  Wanted(const T* const* from, int count, unsigned seen, int dim) {
    const bool every = (~seen & ((1u << count) - 1)) == 0;
    for (int i = 0; i < count && !every; i++)
      if (seen >> i & 1) panel[ahead.runs++] = from[i];
    if (every) ahead.runs = count;
    ahead.run = reinterpret_cast<const char* const*>(every ? from : panel);
    ahead.bytes = int64_t(sizeof(T)) * PANEL * dim;
  }
};

// Scores, softmax and values of rows [first, last) in the block that begins at `start`; the one to come begins at `next`.
template <class T>
void see_block(const Attention& it, Desk& desk, const Past& past, int first, int last, int64_t start, int64_t next,
               const Into& into) {
  const int dim = it.cache.dim;
  const bool unpacked = last - first > STREAMS || dim % LANES;
  const Block<T> block(it.cache, past, start), after(it.cache, past, next);
  const RowTiles tiles(it, desk, first, last, start);
  Wanted<T> values(block.value, block.panels, tiles.all, dim);
  Wanted<T> keys(after.key, after.panels, next < past.end ? past.view.panels(next) : 0, dim);
  const float* panel[PANELS];
  if constexpr (std::is_same_v<T, int8_t>) {
    score_bytes(it, desk, tiles, block, values.ahead);
  } else if (last - first >= MANY && !std::is_same_v<T, float>) {
    unpack_keys(block, tiles.all, dim, desk.keys);
    for (int i = 0; i < block.panels; i++) panel[i] = desk.keys + int64_t(i) * dim * PANEL;
    score_block<float>(it, desk, tiles, panel, block.panels, values.ahead);
  } else {
    score_block<T>(it, desk, tiles, block.key, block.panels, values.ahead);
  }
  for (int t = 0; t < tiles.count; t++)
    for (int r = tiles.at[t]; r < tiles.at[t + 1]; r++)
      soften(it, desk.row[r], start, tiles.first[t], tiles.panels(t) * PANEL,
             std::is_same_v<T, Fp8> ? block.key_scale : nullptr, sizeof(T) == 1 ? block.value_scale : nullptr, desk.s + r * S_STRIDE, &desk.m_block[r], &desk.l_block[r]);
  if (!into.apart) fold(desk, first, last);
  if (unpacked) {
    unpack_values(block, tiles.all, int(std::min<int64_t>(KEYS, past.end - start)), dim, desk.values);
    value_block(it, desk, tiles, into, keys.ahead);
  } else {
    stream_block<T>(it, desk, tiles, block.value, into, keys.ahead);
  }
}

// Rows [first, last) of the desk, in the order of their positions, walk over the blocks of `table`, keys [begin, end).
template <class T>
void walk(const Attention& it, Desk& desk, int head, const int32_t* table, int first, int last, int64_t begin,
          int64_t end) {
  const View view(desk, first, last);
  const Past past{head, table, end, view};
  for (int64_t start = view.next(begin, end); start < end;) {
    while (first < last && desk.row[first].reach.to <= start) first++;  // they see none of these keys, nor of later ones
    const int64_t next = view.next(start + KEYS, end);
    see_block<T>(it, desk, past, first, last, start, next, {desk.o, desk.o_stride, false});
    start = next;
  }
}

// Queries of the desk's rows, scaled, from [tokens][heads * dim]; and walks that have seen nothing.
void sit_down(const Attention& it, Desk& desk, int rows) {
  const int dim = it.cache.dim;
  for (int r = 0; r < rows; r++) {
    const float* from = it.q + desk.row[r].token * it.q_stride + int64_t(desk.row[r].head) * dim;
    float* q = desk.q + r * desk.q_stride;
    for (int d = 0; d < dim; d += LANES) store(q + d, load(from + d, dim - d) * all(it.scale));
    desk.m[r] = NOTHING, desk.l[r] = 0.0f;
    if (it.cache.type != Type::int8) continue;
    int8_t* codes = desk.codes + r * desk.code_stride;
    desk.q_scale[r] = to_bytes(q, dim, int(divide_up(dim, LANES)) * LANES, codes);
    desk.q_sum[r] = 0;
    for (int d = 0; d < dim; d++) desk.q_sum[r] += codes[d];
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

}  // namespace
