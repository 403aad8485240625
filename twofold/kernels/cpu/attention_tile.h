// The two products of attention, for a register tile of rows (a row is one query of one head).
//
//   scores   s[row, key] = sum over d of q[row, d] * key panel[d][16 keys]        lanes are keys
//   values   o[row, d]   = sum over keys of p[row, key] * value[key][16 d]        lanes are numbers of the head
//
// Every output is one accumulator, added to by fma in increasing d (or key). Rows share what is loaded; how many of them
// stand together, and how many panels a tile is wide, only decides when, so a row's bits are its own.
#pragma once
#include <cmath>
#include <utility>

#include "cache.h"

constexpr int KEYS = 128;              // keys of a block: the unit of the walk, in absolute positions
constexpr int PANELS = KEYS / PANEL;   // panels of a block
constexpr int S_STRIDE = KEYS + LANES;  // of rows of scores: not a power of two, so that they do not share cache sets
#if defined(__AVX512F__)
constexpr int TILE = 12;               // rows of a register tile: 12 x 2 panels fill 24 of 32 registers
constexpr int wide_for(int rows) { return rows <= 2 ? 4 : 2; }
#else
constexpr int TILE = 6;                // 6 x 1 panels fill 12 of 16 registers
constexpr int wide_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

constexpr int CHUNK = 4;               // steps between two looks ahead

static inline V16 widened(const float* from) { return load(from); }
static inline V16 widened(const uint16_t* from) { return load_bf16(from); }
struct Fp8 {
  uint8_t bits;
};
static inline V16 widened(const Fp8* from) { return load_fp8(&from->bits); }
static inline V16 widened(const int8_t* from) { return load_s8(from); }

// Asks for memory that will be wanted soon, some lines at a time while something else is computed.
struct Ahead {
  const char* const* run = nullptr;  // pieces of `bytes` bytes
  int runs = 0;
  int64_t bytes = 0, at = 0;

  void next(int64_t lines) {
    if (!runs) return;
    const int64_t end = std::min(bytes, at + 64 * lines);
    for (; at < end; at += 64) __builtin_prefetch(*run + at, 0, 2);
    if (at >= bytes) at = 0, run++, runs--;
  }
};

template <int P, class T>
constexpr int lines_of(int steps) { return steps * int(sizeof(T)) * PANEL * P / 64; }  // memory that `steps` of a tile read

struct Scores {
  const float* q;  // [rows][q_stride]
  int64_t q_stride;
  int dim;
  float* s;        // [rows][s_stride], 16 for each panel
  int64_t s_stride;
};

template <int M, int P, class T>
void score_tile(const Scores& it, const T* const* panels, Ahead& ahead) {
  const T* panel[P];
  const float* q[M];
  const int dim = it.dim;
  TF_UNROLL for (int p = 0; p < P; p++) panel[p] = panels[p];
  TF_UNROLL for (int m = 0; m < M; m++) q[m] = it.q + m * it.q_stride;
  V16 c[M][P];
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = all(0.0f);
  for (int from = 0; from < dim; from += CHUNK) {
    ahead.next(lines_of<P, T>(CHUNK));
    const int end = std::min(dim, from + CHUNK);
    for (int d = from; d < end; d++) {
      V16 k[P];
      TF_UNROLL for (int p = 0; p < P; p++) k[p] = widened(panel[p] + d * PANEL);
      TF_UNROLL for (int m = 0; m < M; m++) {
        const V16 x = all(q[m][d]);
        TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = fma(x, k[p], c[m][p]);
      }
    }
  }
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) store(it.s + m * it.s_stride + p * PANEL, c[m][p]);
}

struct Values {
  const float* p;  // from key 0 of the block
  int64_t p_stride, p_step;    // from a row to the next, and from a key to the next
  int first, keys;             // of the block: `first` is a multiple of 16
  int64_t width;               // from one key's numbers to the next key's
  const float *old, *fresh;    // [rows] what the walk so far, and this block, are multiplied by; null: only this block
  float* o;                    // [rows][o_stride]
  int64_t o_stride;
  unsigned panels = ~0u;       // bit i: keys 16 i to 16 i + 15 are looked at
};

// `from` and `to`: the first of the sixteen numbers of each of P columns, in a key's row and in o.
template <int M, int P>
void value_tile(const Values& it, const float* const* page, const int64_t* from, const int64_t* to, Ahead& ahead) {
  const int64_t width = it.width, p_stride = it.p_stride, p_step = it.p_step;
  V16 c[M][P];
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = all(0.0f);
  for (int key = it.first; key < it.keys; key += PANEL) {
    if (!(it.panels >> key / PANEL & 1)) continue;
    const float* line[P];
    TF_UNROLL for (int p = 0; p < P; p++) line[p] = page[key / PANEL] + from[p];
    const float* weight = it.p + key * p_step;
    ahead.next(lines_of<P, float>(PANEL));
    for (int left = std::min(PANEL, it.keys - key); left; left--, weight += p_step) {
      V16 v[P];
      TF_UNROLL for (int p = 0; p < P; p++) v[p] = load(line[p]), line[p] += width;
      TF_UNROLL for (int m = 0; m < M; m++) {
        const V16 x = all(weight[m * p_stride]);
        TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = fma(x, v[p], c[m][p]);
      }
    }
  }
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) {
      float* o = it.o + m * it.o_stride + to[p];
      store(o, it.old ? load(o) * all(it.old[m]) + c[m][p] * all(it.fresh[m]) : c[m][p]);
    }
}

// A few keys by a few rows: sums [M][stride] += weights * lines, key after key, from a line's first number to its last.
template <int M, int N, class T>
inline void stream(const float* weight, int64_t weight_stride, const T* line, int64_t width, int columns, float* sum,
                   int64_t stride, Ahead& ahead) {
  float w[N][M];
  TF_UNROLL for (int n = 0; n < N; n++)
    TF_UNROLL for (int m = 0; m < M; m++) w[n][m] = weight[m * weight_stride + n];
  for (int c = 0; c < columns; c++) {
    V16 s[M];
    ahead.next(lines_of<N, T>(1));
    TF_UNROLL for (int m = 0; m < M; m++) s[m] = load(sum + m * stride + c * LANES);
    TF_UNROLL for (int n = 0; n < N; n++) {
      const V16 v = widened(line + n * width + c * LANES);
      TF_UNROLL for (int m = 0; m < M; m++) s[m] = fma(all(w[n][m]), v, s[m]);
    }
    TF_UNROLL for (int m = 0; m < M; m++) store(sum + m * stride + c * LANES, s[m]);
  }
}

// value_tile for so few rows that memory is the limit: values are read in the order in which they lie, and the sums, which
// fit the first-level cache, go in and out of registers.
constexpr int STREAMS = 3;
template <int M, class T>
void value_stream(const Values& it, const T* const* page, int columns, float* sum, Ahead& ahead) {
  constexpr int N = M <= 2 ? 4 : 2;
  std::fill_n(sum, M * it.o_stride, 0.0f);
  for (int key = it.first; key < it.keys; key += PANEL) {
    if (!(it.panels >> key / PANEL & 1)) continue;
    const int count = std::min(PANEL, it.keys - key);
    int i = 0;
    const T* line = page[key / PANEL];
    for (; i + N <= count; i += N, line += N * it.width)
      stream<M, N>(it.p + key + i, it.p_stride, line, it.width, columns, sum, it.o_stride, ahead);
    for (; i < count; i++, line += it.width)
      stream<M, 1>(it.p + key + i, it.p_stride, line, it.width, columns, sum, it.o_stride, ahead);
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < columns; c++) {
      float* o = it.o + m * it.o_stride + c * LANES;
      const V16 s = load(sum + m * it.o_stride + c * LANES);
      store(o, it.old ? load(o) * all(it.old[m]) + s * all(it.fresh[m]) : s);
    }
}

// The tiles of each number of rows: `wide` for wide_for(rows) panels, `one` for a panel.
template <class T>
struct ScoreTiles {
  using Score = void (*)(const Scores&, const T* const*, Ahead&);
  Score wide[TILE], one[TILE];

  constexpr ScoreTiles() : ScoreTiles(std::make_integer_sequence<int, TILE>()) {}

 private:
  template <int... M>
  constexpr explicit ScoreTiles(std::integer_sequence<int, M...>)
      : wide{score_tile<M + 1, wide_for(M + 1), T>...}, one{score_tile<M + 1, 1, T>...} {}
};

struct ValueTiles {
  using Value = void (*)(const Values&, const float* const*, const int64_t*, const int64_t*, Ahead&);
  Value wide[TILE], one[TILE];

  constexpr ValueTiles() : ValueTiles(std::make_integer_sequence<int, TILE>()) {}

 private:
  template <int... M>
  constexpr explicit ValueTiles(std::integer_sequence<int, M...>)
      : wide{value_tile<M + 1, wide_for(M + 1)>...}, one{value_tile<M + 1, 1>...} {}
};

template <class T>
constexpr ScoreTiles<T> score_tiles{};
constexpr ValueTiles value_tiles{};

constexpr unsigned ALL_PANELS = (1u << PANELS) - 1;

// Panels that hold any of the keys [first, last) of a block.
inline unsigned panels_of(int first, int last) {
  return ((1u << divide_up(last, PANEL)) - 1) & ~((1u << first / PANEL) - 1);
}

// The keys [from, to) of its sequence that a row may see: what stands before it, itself, and with `ahead` what comes after;
// no further than a window reaches.
struct Reach {
  int32_t from, to;
  Reach() = default;
  Reach(int64_t window, int64_t ahead, int64_t position, int64_t length)
      : from(window ? int32_t(std::max<int64_t>(0, position - window + 1)) : 0),
        to(int32_t(!ahead ? position + 1 : window ? std::min(length, position + window) : length)) {}
};

// Keys of a block that a row sees: those of [first, last) in the panels that are there. `layout` is its row of bytes.
struct Sight {
  int first, last;
  unsigned there;
  Sight(Reach reach, const uint8_t* layout, int64_t start) {
    first = int(std::clamp<int64_t>(reach.from - start, 0, KEYS));
    last = int(std::clamp<int64_t>(reach.to - start, 0, KEYS));
    there = layout ? layout[start / KEYS] : ALL_PANELS;
  }
  unsigned panels() const { return panels_of(first, last) & there; }
};

static const float PLACE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Scores of sixteen keys from key i of a block on, the first of them `distance` behind the query (so below 0): biased by
// distance, -inf where hidden.
static inline V16 biased(V16 x, const float* slope, int64_t distance, const Sight& sight, int i) {
  const V16 place = load(PLACE), hidden = all(-INFINITY);
  if (!(sight.there >> i / LANES & 1)) return hidden;
  if (slope) x = x + all(*slope) * (place + all(float(distance)));
  if (i >= sight.first && i + LANES <= sight.last) return x;
  x = where_less(place, all(float(sight.last - i)), x, hidden);
  return where_less(place, all(float(sight.first - i)), hidden, x);
}
