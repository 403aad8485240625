// Where a token's key and value lie in the paged cache, and how they are written there.
//
//   one block of one head, `size` tokens          key panel, 16 tokens       int8 key panel
//   keys   │ panel │ panel │ ...                  d0 │ t0 t1 ... t15 │       d0-3 │ t0 t0 t0 t0 t1 t1 ... │
//   values │ t0: d0 d1 ... │ t1: d0 d1 ... │      d1 │ t0 t1 ... t15 │       d4-7 │ t0 t0 t0 t0 t1 t1 ... │
//
// Both kinds of panel begin at (token within the block) * (width of a token), so one offset serves keys and values. bf16
// is rounded to nearest even. int8 has one scale for each token and head, its largest magnitude / 127, and fp8 (e4m3), which
// lies as floats do, / 448; the scale of numbers that are not all finite is not a number, so that they are seen for what
// they are.
#pragma once
#include <algorithm>

#include "stages.h"

constexpr int PANEL = LANES;     // tokens of a key panel
constexpr int MOST_DIM = 1024;   // numbers of a head

// Numbers of a token in the keys: whole groups of four where they are bytes.
inline int64_t key_width(const Cache& cache) { return cache.type == Type::int8 ? divide_up(cache.dim, 4) * 4 : cache.dim; }

// The row of a token in a cache of [blocks][kv_heads][size] rows.
inline int64_t cache_row(const Cache& cache, const int32_t* table, int64_t position, int head) {
  const int64_t block = table[position / cache.size];
  return (block * cache.kv_heads + head) * cache.size + position % cache.size;
}

// s8 codes of a row, zero up to `padded`; returns the scale.
inline float to_bytes(const float* x, int count, int padded, int8_t* codes) {
  V16 most = all(0.0f), broken = all(0.0f);
  for (int i = 0; i < count; i += LANES) {
    const V16 v = load(x + i, count - i);
    most = max(most, magnitude(v));
    broken = fma(v, all(0.0f), broken);  // 0, or not a number
  }
  const float scale = largest(most) / 127.0f + total(broken);
  const V16 by = all(scale > 0.0f ? scale : 1.0f);
  for (int i = 0; i < padded; i += LANES) {
    alignas(16) int8_t part[LANES];
    store_s8(part, min(all(127.0f), max(all(-127.0f), nearest(load(x + i, count - i) / by))));
    std::memcpy(codes + i, part, std::min(LANES, padded - i));
  }
  return scale;
}

inline void write_bytes(const Cache& cache, int64_t row, const float* k, const float* v) {
  const int width = int(key_width(cache)), lane = int(row % PANEL);
  alignas(64) int8_t codes[MOST_DIM];
  cache.key_scales[row] = to_bytes(k, cache.dim, width, codes);
  int8_t* panel = static_cast<int8_t*>(cache.keys) + (row - lane) * width + lane * 4;
  for (int d = 0; d < width; d += 4) std::memcpy(panel + d * PANEL, codes + d, 4);
  cache.value_scales[row] = to_bytes(v, cache.dim, cache.dim, static_cast<int8_t*>(cache.values) + row * cache.dim);
}

// e4m3 numbers of a row, `stride` apart; returns the scale.
inline float to_fp8(const float* x, int count, uint8_t* to, int stride) {
  V16 most = all(0.0f), broken = all(0.0f);
  for (int i = 0; i < count; i += LANES) {
    const V16 v = load(x + i, count - i);
    most = max(most, magnitude(v));
    broken = fma(v, all(0.0f), broken);
  }
  const float scale = largest(most) / 448.0f + total(broken), by = scale > 0.0f ? scale : 1.0f;
  for (int i = 0; i < count; i++) to[i * stride] = narrow_fp8(x[i] / by);
  return scale;
}

// One token's key and value of one head.
inline void write_token(const Cache& cache, const int32_t* table, int64_t position, int head, const float* k,
                        const float* v) {
  const int64_t row = cache_row(cache, table, position, head);
  const int lane = int(row % PANEL), dim = cache.dim;
  const int64_t panel = (row - lane) * dim + lane;
  switch (cache.type) {
    case Type::int8: return write_bytes(cache, row, k, v);
    case Type::fp8:
      cache.key_scales[row] = to_fp8(k, dim, static_cast<uint8_t*>(cache.keys) + panel, PANEL);
      cache.value_scales[row] = to_fp8(v, dim, static_cast<uint8_t*>(cache.values) + row * dim, 1);
      return;
    case Type::bf16: {
      uint16_t* keys = static_cast<uint16_t*>(cache.keys) + panel;
      uint16_t* values = static_cast<uint16_t*>(cache.values) + row * dim;
      for (int d = 0; d < dim; d++) keys[d * PANEL] = narrow(k[d]), values[d] = narrow(v[d]);
      return;
    }
    default: {
      float *keys = static_cast<float*>(cache.keys) + panel, *values = static_cast<float*>(cache.values) + row * dim;
      for (int d = 0; d < dim; d++) keys[d * PANEL] = k[d];
      std::memcpy(values, v, sizeof(float) * dim);
    }
  }
}
