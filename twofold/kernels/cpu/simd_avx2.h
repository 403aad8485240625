// V16 in two AVX2 registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

struct V16 {
  __m256 lo, hi;
};

static inline V16 load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline void store(float* to, V16 x) { _mm256_storeu_ps(to, x.lo), _mm256_storeu_ps(to + 8, x.hi); }
static inline V16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline V16 fma(V16 a, V16 b, V16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
static inline V16 operator+(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline V16 operator-(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline V16 operator*(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline V16 operator/(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
// Of two numbers the larger (smaller); where one is not a number, the second.
static inline V16 max(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline V16 min(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline V16 magnitude(V16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}
// x where a < b, else y.
static inline V16 where_less(V16 a, V16 b, V16 x, V16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
static inline V16 nearest(V16 x) {
  constexpr int even = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, even), _mm256_round_ps(x.hi, even)};
}
// 2^n for whole n from -126 to 127.
static inline V16 power_of_two(V16 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lo), bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.hi), bias), 23))};
}
static inline V16 load_bf16(const uint16_t* from) {
  const __m128i* at = reinterpret_cast<const __m128i*>(from);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16))};
}
static inline V16 load_fp16(const uint16_t* from) {
  const __m128i* at = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
// e4m3: the bits of a float that is 2^120 times too small.
static inline V16 load_fp8(const uint8_t* from) {
  const auto part = [](__m128i bytes) {
    const __m256i all = _mm256_cvtepu8_epi32(bytes), sign = _mm256_slli_epi32(_mm256_and_si256(all, _mm256_set1_epi32(0x80)), 24);
    const __m256i rest = _mm256_slli_epi32(_mm256_and_si256(all, _mm256_set1_epi32(0x7f)), 20);
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, rest)), _mm256_castsi256_ps(_mm256_set1_epi32(0x7b800000)));
  };
  const __m128i all16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {part(all16), part(_mm_unpackhi_epi64(all16, all16))};
}
static inline V16 load_s8(const int8_t* from) {
  const __m128i all16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all16)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(all16, all16)))};
}
// Sixteen whole numbers from -128 to 127 as bytes.
static inline void store_s8(int8_t* to, V16 x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
// The largest of sixteen, not a number where any is not.
static inline float largest(V16 x) {
  const __m256 odd = _mm256_or_ps(_mm256_cmp_ps(x.lo, x.lo, _CMP_UNORD_Q), _mm256_cmp_ps(x.hi, x.hi, _CMP_UNORD_Q));
  if (_mm256_movemask_ps(odd)) return __builtin_nanf("");
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// The sum of sixteen by one tree: halves onto halves.
static inline float total(V16 x) {
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline void prefetch(const void* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
static inline void pause_thread() { _mm_pause(); }

// Eight rows of eight 32-bit numbers become eight columns.
static inline void transpose8(__m256 r[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    u[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

// Sixteen rows by sixteen inner numbers, `stride` apart, become sixteen lines of a panel: to[k][row].
static inline void transpose16(const float* from, int64_t stride, float* to) {
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k += 8) {
      __m256 r[8];
      for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + (half * 8 + i) * stride + k);
      transpose8(r);
      for (int i = 0; i < 8; i++) _mm256_storeu_ps(to + (k + i) * 16 + half * 8, r[i]);
    }
}
static inline void transpose16(const uint16_t* from, int64_t stride, float* to) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  for (int half = 0; half < 2; half++) {
    __m256 r[8];  // pairs of neighbours in k travel as one 32-bit number
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + (half * 8 + i) * stride));
    transpose8(r);
    for (int i = 0; i < 8; i++) {
      const __m256i pair = _mm256_castps_si256(r[i]);
      _mm256_storeu_ps(to + (2 * i) * 16 + half * 8, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)));
      _mm256_storeu_ps(to + (2 * i + 1) * 16 + half * 8, _mm256_castsi256_ps(_mm256_and_si256(pair, upper)));
    }
  }
}

// Eight rows of w by sixteen inner numbers, added to the sums of M rows of activations: transposed and multiplied in
// registers, never written.
template <int M>
static inline void add_rows8(const float* from, int64_t stride, const float* const* a, int k, __m256* c) {
  for (int i = 0; i < 16; i += 8) {
    __m256 r[8];
    TF_UNROLL for (int j = 0; j < 8; j++) r[j] = _mm256_loadu_ps(from + j * stride + k + i);
    transpose8(r);
    TF_UNROLL for (int j = 0; j < 8; j++)
      TF_UNROLL for (int m = 0; m < M; m++) c[m] = _mm256_fmadd_ps(_mm256_broadcast_ss(a[m] + k + i + j), r[j], c[m]);
  }
}
template <int M>
static inline void add_rows8(const uint16_t* from, int64_t stride, const float* const* a, int k, __m256* c) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  __m256 r[8];  // pairs of neighbours in k
  TF_UNROLL for (int j = 0; j < 8; j++) r[j] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + j * stride + k));
  transpose8(r);
  TF_UNROLL for (int j = 0; j < 8; j++) {
    const __m256i pair = _mm256_castps_si256(r[j]);
    const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
    const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pair, upper));
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = _mm256_fmadd_ps(_mm256_broadcast_ss(a[m] + k + 2 * j), even, c[m]);
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = _mm256_fmadd_ps(_mm256_broadcast_ss(a[m] + k + 2 * j + 1), odd, c[m]);
  }
}

// Sixteen rows of w by sixteen inner numbers from k on, added to the sums of M rows of activations.
template <int M, class W>
static inline void add_rows16(const W* from, int64_t stride, const float* const* a, int k, V16 (&c)[M]) {
  __m256 lo[M], hi[M];
  TF_UNROLL for (int m = 0; m < M; m++) lo[m] = c[m].lo, hi[m] = c[m].hi;
  add_rows8<M>(from, stride, a, k, lo);
  add_rows8<M>(from + 8 * stride, stride, a, k, hi);
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = {lo[m], hi[m]};
}
