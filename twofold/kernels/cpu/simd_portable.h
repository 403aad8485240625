// V16 as a plain array: any compiler's own vectors (NEON on ARM), and the slow truth of the other two.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct V16 {
  float lane[16];
};

template <class F>
static inline V16 each(F f) {
  V16 out;
  for (int i = 0; i < 16; i++) out.lane[i] = f(i);
  return out;
}

static inline V16 load(const float* from) { return each([&](int i) { return from[i]; }); }
static inline void store(float* to, V16 x) { std::memcpy(to, x.lane, sizeof x.lane); }
static inline V16 all(float x) { return each([&](int) { return x; }); }
static inline V16 fma(V16 a, V16 b, V16 c) {
  return each([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
static inline V16 operator+(V16 a, V16 b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
static inline V16 operator-(V16 a, V16 b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
static inline V16 operator*(V16 a, V16 b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
static inline V16 operator/(V16 a, V16 b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
// Of two numbers the larger (smaller); where one is not a number, the second.
static inline V16 max(V16 a, V16 b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
static inline V16 min(V16 a, V16 b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
static inline V16 magnitude(V16 x) { return each([&](int i) { return std::fabs(x.lane[i]); }); }
// x where a < b, else y.
static inline V16 where_less(V16 a, V16 b, V16 x, V16 y) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
}
static inline V16 nearest(V16 x) { return each([&](int i) { return std::nearbyintf(x.lane[i]); }); }
// 2^n for whole n from -126 to 127; of what is not a number, something.
static inline V16 power_of_two(V16 n) {
  return each([&](int i) {
    const int32_t whole = n.lane[i] == n.lane[i] ? int32_t(n.lane[i]) : 0;
    const uint32_t bits = uint32_t(whole + 127) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}
static inline V16 load_bf16(const uint16_t* from) {
  return each([&](int i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}
static inline float widen_fp8(uint8_t byte);  // simd.h
static inline V16 load_fp8(const uint8_t* from) { return each([&](int i) { return widen_fp8(from[i]); }); }
static inline V16 load_s8(const int8_t* from) { return each([&](int i) { return float(from[i]); }); }
// Sixteen whole numbers from -128 to 127 as bytes.
static inline void store_s8(int8_t* to, V16 x) {
  for (int i = 0; i < 16; i++) to[i] = x.lane[i] == x.lane[i] ? int8_t(x.lane[i]) : 0;
}
// The largest of sixteen, not a number where any is not.
static inline float largest(V16 x) {
  float most = x.lane[0];
  for (int i = 1; i < 16; i++) most = x.lane[i] > most || x.lane[i] != x.lane[i] ? x.lane[i] : most;
  return most;
}

// The sum of sixteen by one tree: halves onto halves.
static inline float total(V16 x) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) x.lane[i] = x.lane[i] + x.lane[i + half];
  return x.lane[0];
}
static inline void prefetch(const void* at) { __builtin_prefetch(at); }
static inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sixteen rows by sixteen inner numbers, `stride` apart, become sixteen lines of a panel: to[k][row].
static inline void transpose16(const float* from, int64_t stride, float* to) {
  for (int k = 0; k < 16; k++)
    for (int row = 0; row < 16; row++) to[k * 16 + row] = from[row * stride + k];
}
static inline void transpose16(const uint16_t* from, int64_t stride, float* to) {
  for (int row = 0; row < 16; row++) {
    const V16 wide = load_bf16(from + row * stride);
    for (int k = 0; k < 16; k++) to[k * 16 + row] = wide.lane[k];
  }
}

// Sixteen rows of w by sixteen inner numbers from k on, added to the sums of M rows of activations.
template <int M, class W>
static inline void add_rows16(const W* from, int64_t stride, const float* const* a, int k, V16 (&c)[M]) {
  alignas(64) float panel[16 * 16];
  transpose16(from + k, stride, panel);
  for (int i = 0; i < 16; i++)
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = fma(all(a[m][k + i]), load(panel + i * 16), c[m]);
}
