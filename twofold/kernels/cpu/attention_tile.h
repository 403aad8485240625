// The two products of attention, for a register tile of rows (a row is one query of one head).
//
//   scores   s[row, key] = sum over d of q[row, d] * key panel[d][16 keys]        lanes are keys
//   values   o[row, d]   = sum over keys of p[row, key] * value[key][16 d]        lanes are numbers of the head
//
// Every output is one accumulator, added to by fma in increasing d (or key). Rows share what is loaded; how many of them
// stand together, and how many panels a tile is wide, only decides when, so a row's bits are its own.
#pragma once
#include <utility>

#include "cache.h"
#include "whole.h"

constexpr int KEYS = 128;              // keys of a block: the unit of the walk, in absolute positions
constexpr int PANELS = KEYS / PANEL;   // panels of a block
#if defined(__AVX512F__)
constexpr int TILE = 12;               // rows of a register tile: 12 x 2 panels fill 24 of 32 registers
constexpr int wide_for(int rows) { return rows <= 2 ? 4 : 2; }
#else
constexpr int TILE = 6;                // 6 x 1 panels fill 12 of 16 registers
constexpr int wide_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

constexpr int CHUNK = 16;              // steps between two looks ahead

static inline V16 widened(const float* from) { return load(from); }
static inline V16 widened(const uint16_t* from) { return load_bf16(from); }
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

struct Values {
  const float* p;  // from key 0 of the block
  int64_t p_stride, p_step;    // from a row to the next, and from a key to the next
  int first, keys;             // of the block: `first` is a multiple of 16
  int64_t width;               // from one key's numbers to the next key's
  const float *old, *fresh;    // [rows] what the walk so far, and this block, are multiplied by; null: only this block
  float* o;                    // [rows][o_stride]
  int64_t o_stride;
};

// `from` and `to`: the first of the sixteen numbers of each of P columns, in a key's row and in o.
template <int M, int P, class T>
void value_tile(const Values& it, const T* const* page, const int64_t* from, const int64_t* to, Ahead& ahead) {
  const int64_t width = it.width, p_stride = it.p_stride, p_step = it.p_step;
  V16 c[M][P];
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = all(0.0f);
  for (int key = it.first; key < it.keys; key += PANEL) {
    const T* line[P];
    TF_UNROLL for (int p = 0; p < P; p++) line[p] = page[key / PANEL] + from[p];
    const float* weight = it.p + key * p_step;
    ahead.next(lines_of<P, T>(PANEL));
    for (int left = std::min(PANEL, it.keys - key); left; left--, weight += p_step) {
      V16 v[P];
      TF_UNROLL for (int p = 0; p < P; p++) v[p] = widened(line[p]), line[p] += width;
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

// The tiles of each number of rows: `wide` for wide_for(rows) panels, `one` for a panel.
template <class T>
struct Tiles {
  using Score = void (*)(const Scores&, const T* const*, Ahead&);
  using Value = void (*)(const Values&, const T* const*, const int64_t*, const int64_t*, Ahead&);
  Score wide_score[TILE], one_score[TILE];
  Value wide_value[TILE], one_value[TILE];

  constexpr Tiles() : Tiles(std::make_integer_sequence<int, TILE>()) {}

 private:
  template <int... M>
  constexpr explicit Tiles(std::integer_sequence<int, M...>)
      : wide_score{score_tile<M + 1, wide_for(M + 1), T>...},
        one_score{score_tile<M + 1, 1, T>...},
        wide_value{value_tile<M + 1, wide_for(M + 1), T>...},
        one_value{value_tile<M + 1, 1, T>...} {}
};

struct ByteTiles {
  using Score = void (*)(const ByteScores&, const int8_t*, const float*);
  Score score[TILE];

  constexpr ByteTiles() : ByteTiles(std::make_integer_sequence<int, TILE>()) {}

 private:
  template <int... M>
  constexpr explicit ByteTiles(std::integer_sequence<int, M...>) : score{score_bytes_tile<M + 1>...} {}
};
