// Whole numbers as plain arrays: the slow truth, and any compiler's own vectors.
#pragma once
#include <cstdint>

struct I16 {
  int32_t lane[16];
};

constexpr int WHOLE_ROWS = 4;
template <int BITS>
constexpr int LIFT = 0;

template <class F>
static inline I16 each_whole(F f) {
  I16 out;
  for (int i = 0; i < 16; i++) out.lane[i] = f(i);
  return out;
}
static inline I16 all_whole(int32_t x) { return each_whole([&](int) { return x; }); }
static inline I16 operator+(I16 a, I16 b) { return each_whole([&](int i) { return a.lane[i] + b.lane[i]; }); }
static inline I16 operator-(I16 a, I16 b) { return each_whole([&](int i) { return a.lane[i] - b.lane[i]; }); }
static inline I16 operator*(I16 a, I16 b) { return each_whole([&](int i) { return a.lane[i] * b.lane[i]; }); }
template <int N>
static inline I16 times(I16 x) {  // a power of two
  return each_whole([&](int i) { return x.lane[i] * N; });
}
static inline V16 to_float(I16 x) { return each([&](int i) { return float(x.lane[i]); }); }
static inline I16 load_whole_s8(const int8_t* from) { return each_whole([&](int i) { return int32_t(from[i]); }); }

static inline I16 load_words(const uint8_t* from) {  // four bytes in each lane, the first lowest
  return each_whole([&](int i) {
    const uint8_t* at = from + 4 * i;
    return int32_t(at[0] | uint32_t(at[1]) << 8 | uint32_t(at[2]) << 16 | uint32_t(at[3]) << 24);
  });
}
// BITS of each lane from bit FIRST on, int8 with its sign.
template <int BITS, int FIRST>
static inline I16 code_in(I16 x) {
  return each_whole([&](int i) {
    const uint32_t code = uint32_t(x.lane[i]) >> FIRST;
    return BITS == 8 ? int32_t(int8_t(code)) : int32_t(code & 15);
  });
}

// The byte of each lane from bit FIRST on, an e4m3 number.
template <int FIRST>
static inline V16 fp8_in(I16 x) {
  return each([&](int i) { return widen_fp8(uint8_t(uint32_t(x.lane[i]) >> FIRST)); });
}

template <int BITS, int M>
static inline void whole_sums(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  constexpr int inner = BITS == 8 ? 4 : 8;
  for (int m = 0; m < M; m++) c[m] = all_whole(0);
  for (int i = 0; i < inputs; i += inner, a += inner, w += 64)
    for (int j = 0; j < 4; j++) {
      int16_t first[16], last[16];
      for (int n = 0; n < 16; n++) {
        const uint8_t code = w[4 * n + j];
        first[n] = BITS == 8 ? int8_t(code) : code & 15, last[n] = code >> 4;
      }
      for (int m = 0; m < M; m++) {
        const int16_t x = a[m * stride + j];
        for (int n = 0; n < 16; n++) c[m].lane[n] += x * first[n];
        if constexpr (BITS == 4) {
          const int16_t y = a[m * stride + 4 + j];
          for (int n = 0; n < 16; n++) c[m].lane[n] += y * last[n];
        }
      }
    }
}
