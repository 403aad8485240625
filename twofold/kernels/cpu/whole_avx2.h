// Whole numbers with AVX2.
//
// int8 by int8 is done in 16 bits (madd: two products and their sum): activations are kept so, and the even and odd bytes
// of a register of codes are widened where they stand, which is why activations lie as 0 2 1 3. int4 by int8 is done in
// bytes (maddubs) and added up in 16 bits for 32 inputs, which cannot overflow: 8 x 2 x 15 x 127 = 30,480.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

struct I16 {
  __m256i lo, hi;
};

constexpr int WHOLE_ROWS = 6;  // 6 x 16 sums fill 12 of 16 registers
template <int BITS>
constexpr int CODE_BYTES = BITS == 8 ? 2 : 1;
template <int BITS>
constexpr int LIFT = 0;

static inline I16 all_whole(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline I16 operator-(I16 a, I16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
static inline I16 operator*(I16 a, I16 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
static inline V16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
static inline I16 load_whole_s8(const int8_t* from) {
  const __m128i all16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi8_epi32(all16), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(all16, all16))};
}

static inline __m256i load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
static inline __m256i spread4(const int8_t* from) {  // four bytes, in each 32-bit lane
  int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}

template <int BITS>
static inline void store_codes(int8_t* to, V16 x) {
  const __m256i mixed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
  const __m256i words = _mm256_permute4x64_epi64(mixed, 0xd8);
  if constexpr (BITS == 8) {
    const __m256i even_odd = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), even_odd);
  } else {
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  }
}

template <int M>
static inline void add_madd(I16 (&c)[M], const int8_t* a, int64_t stride, __m256i lo, __m256i hi) {
  TF_UNROLL for (int m = 0; m < M; m++) {
    const __m256i x = spread4(a + m * stride);
    c[m].lo = _mm256_add_epi32(c[m].lo, _mm256_madd_epi16(lo, x));
    c[m].hi = _mm256_add_epi32(c[m].hi, _mm256_madd_epi16(hi, x));
  }
}

template <int M>
static inline void whole_sums8(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = all_whole(0);
  for (int i = 0; i < inputs; i += 4, a += 8, w += 64) {
    if constexpr (M <= 4) prefetch(w + AHEAD);
    const __m256i lo = load_bytes(w), hi = load_bytes(w + 32);
    add_madd(c, a, stride, _mm256_srai_epi16(_mm256_slli_epi16(lo, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(hi, 8), 8));
    add_madd(c, a + 4, stride, _mm256_srai_epi16(lo, 8), _mm256_srai_epi16(hi, 8));
  }
}

template <int M>
static inline void add_maddubs(I16 (&c)[M], const int8_t* a, int64_t stride, __m256i lo, __m256i hi) {
  TF_UNROLL for (int m = 0; m < M; m++) {
    const __m256i x = spread4(a + m * stride);
    c[m].lo = _mm256_add_epi16(c[m].lo, _mm256_maddubs_epi16(lo, x));
    c[m].hi = _mm256_add_epi16(c[m].hi, _mm256_maddubs_epi16(hi, x));
  }
}

// At most 32 inputs, in 16 bits; then in 32.
template <int M>
static inline void part_sums4(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = all_whole(0);
  for (int i = 0; i < inputs; i += 8, a += 8, w += 64) {
    if constexpr (M <= 4) prefetch(w + AHEAD);
    const __m256i lo = load_bytes(w), hi = load_bytes(w + 32);
    add_maddubs(c, a, stride, _mm256_and_si256(lo, low), _mm256_and_si256(hi, low));
    add_maddubs(c, a + 4, stride, _mm256_and_si256(_mm256_srli_epi16(lo, 4), low),
                _mm256_and_si256(_mm256_srli_epi16(hi, 4), low));
  }
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = {_mm256_madd_epi16(c[m].lo, one), _mm256_madd_epi16(c[m].hi, one)};
}

template <int M>
static inline void whole_sums4(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  part_sums4(c, a, stride, w, std::min(inputs, 32));
  for (int i = 32; i < inputs; i += 32) {
    I16 part[M];
    part_sums4(part, a + i, stride, w + i * 8, std::min(inputs - i, 32));
    TF_UNROLL for (int m = 0; m < M; m++)
      c[m] = {_mm256_add_epi32(c[m].lo, part[m].lo), _mm256_add_epi32(c[m].hi, part[m].hi)};
  }
}

template <int BITS, int M>
static inline void whole_sums(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  if constexpr (BITS == 8) whole_sums8(c, a, stride, w, inputs);
  else whole_sums4(c, a, stride, w, inputs);
}
