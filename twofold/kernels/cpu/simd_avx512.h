// V16 in one AVX-512 register.
#pragma once
#include <immintrin.h>

#include <cstdint>

struct V16 {
  __m512 v;
};

static inline V16 load(const float* from) { return {_mm512_loadu_ps(from)}; }
static inline void store(float* to, V16 x) { _mm512_storeu_ps(to, x.v); }
static inline V16 all(float x) { return {_mm512_set1_ps(x)}; }
static inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline V16 operator+(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline V16 operator-(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V16 operator*(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline V16 operator/(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// Of two numbers the larger (smaller); where one is not a number, the second.
static inline V16 max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline V16 min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline V16 magnitude(V16 x) { return {_mm512_abs_ps(x.v)}; }
// x where a < b, else y.
static inline V16 where_less(V16 a, V16 b, V16 x, V16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
static inline V16 nearest(V16 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for whole n from -126 to 127.
static inline V16 power_of_two(V16 n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
static inline V16 load_bf16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline V16 load_fp16(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
// e4m3: the bits of a float that is 2^120 times too small.
static inline V16 load_fp8(const uint8_t* from) {
  const __m512i all = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(all, _mm512_set1_epi32(0x80)), 24);
  const __m512i rest = _mm512_slli_epi32(_mm512_and_si512(all, _mm512_set1_epi32(0x7f)), 20);
  const __m512 lift = _mm512_castsi512_ps(_mm512_set1_epi32(0x7b800000));
  return {_mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), lift)};
}
static inline V16 load_s8(const int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
// Sixteen whole numbers from -128 to 127 as bytes.
static inline void store_s8(int8_t* to, V16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
// The largest of sixteen, not a number where any is not.
static inline float largest(V16 x) {
  if (_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q)) return __builtin_nanf("");
  return _mm512_reduce_max_ps(x.v);
}
// The sum of sixteen by one tree: halves onto halves.
static inline float total(V16 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline void prefetch(const void* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
static inline void pause_thread() { _mm_pause(); }

// Sixteen rows of sixteen 32-bit numbers become sixteen columns.
static inline void transpose_registers(__m512 r[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    u[4 * i + 0] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {  // u[i], u[4+i], u[8+i], u[12+i]: a 4 by 4 transposition of 128-bit lanes
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// Sixteen rows by sixteen inner numbers, `stride` apart, become sixteen lines of a panel: to[k][row].
static inline void transpose16(const float* from, int64_t stride, float* to) {
  __m512 r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(from + i * stride);
  transpose_registers(r);
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i * 16, r[i]);
}
static inline void transpose16(const uint16_t* from, int64_t stride, float* to) {
  __m512 r[16];
  for (int i = 0; i < 16; i++) r[i] = load_bf16(from + i * stride).v;
  transpose_registers(r);
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i * 16, r[i]);
}

// Sixteen rows of w by sixteen inner numbers from k on, added to the sums of M rows of activations.
template <int M, class W>
static inline void add_rows16(const W* from, int64_t stride, const float* const* a, int k, V16 (&c)[M]) {
  alignas(64) float panel[16 * 16];
  transpose16(from + k, stride, panel);
  for (int i = 0; i < 16; i++)
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = fma(all(a[m][k + i]), load(panel + i * 16), c[m]);
}
