// Whole numbers with AVX2, which multiplies unsigned bytes by signed ones and adds neighbours in 16 bits (maddubs).
//
// int8 by int8: the code's magnitude by the activation with the code's sign; two products of at most 128 x 127 fit, and are
// added in 32 bits. int4 by int8: codes are unsigned as they are, and 32 inputs add up in 16 bits: 8 x 2 x 15 x 127 = 30,480.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

struct I16 {
  __m256i lo, hi;
};

constexpr int WHOLE_ROWS = 4;  // their sums, codes, the codes' magnitudes and what is being multiplied: 15 of 16 registers
template <int BITS>
constexpr int LIFT = 0;

static inline I16 all_whole(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline I16 operator+(I16 a, I16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
static inline I16 operator-(I16 a, I16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
static inline I16 operator*(I16 a, I16 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
template <int N>
static inline I16 times(I16 x) {  // a power of two
  constexpr int log2 = __builtin_ctz(N);
  return {_mm256_slli_epi32(x.lo, log2), _mm256_slli_epi32(x.hi, log2)};
}
static inline V16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
static inline I16 load_whole_s8(const int8_t* from) {
  const __m128i all16 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi8_epi32(all16), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(all16, all16))};
}

static inline I16 load_words(const uint8_t* from) {  // four bytes in each lane
  const __m256i* at = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
// BITS of each lane from bit FIRST on, int8 with its sign.
template <int BITS, int FIRST>
static inline I16 code_in(I16 x) {
  constexpr int up = 32 - BITS - FIRST, down = 32 - BITS;
  const __m256i lo = _mm256_slli_epi32(x.lo, up), hi = _mm256_slli_epi32(x.hi, up);
  if constexpr (BITS == 8) return {_mm256_srai_epi32(lo, down), _mm256_srai_epi32(hi, down)};
  else return {_mm256_srli_epi32(lo, down), _mm256_srli_epi32(hi, down)};
}

// The byte of each lane from bit FIRST on, an e4m3 number: its bits are those of a float that is 2^120 times too small.
template <int FIRST>
static inline V16 fp8_in(I16 x) {
  const auto part = [](__m256i all) {
    const __m256i top = _mm256_slli_epi32(all, 24 - FIRST), sign = _mm256_and_si256(top, _mm256_set1_epi32(1u << 31));
    const __m256i rest = _mm256_srli_epi32(_mm256_and_si256(top, _mm256_set1_epi32(0x7f << 24)), 4);
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, rest)), _mm256_set1_ps(FP8_LIFT));
  };
  return {part(x.lo), part(x.hi)};
}

static inline __m256i load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
static inline __m256i spread4(const int8_t* from) {  // four bytes, in each 32-bit lane
  int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm256_set1_epi32(four);
}
// Products and sums are one piece of assembly: free to order them, GCC makes all products first and runs out of registers.
//   sum (8 x 32 bits) += sixteen pairs of |code| * (activation with the code's sign), neighbours added
static inline void add_signed(__m256i& sum, __m256i size, __m256i code, __m256i x, __m256i one) {
  __m256i pairs;
  asm("vpsignb %3, %4, %1\n\tvpmaddubsw %1, %2, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(pairs)
      : "x"(size), "xm"(code), "x"(x), "xm"(one));
}
//   sum (16 x 16 bits) += sixteen pairs of code * activation
static inline void add_unsigned(__m256i& sum, __m256i code, __m256i x) {
  __m256i pairs;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(pairs) : "x"(code), "x"(x));
}

// At most 32 inputs of int4.
template <int M>
static inline void part_sums4(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  __m256i lo[M], hi[M];
  TF_UNROLL for (int m = 0; m < M; m++) lo[m] = hi[m] = _mm256_setzero_si256();
  for (int i = 0; i < inputs; i += 8, a += 8, w += 64) {
    prefetch(w + AHEAD);
    const __m256i both_lo = load_bytes(w), both_hi = load_bytes(w + 32);
    const __m256i first_lo = _mm256_and_si256(both_lo, low), first_hi = _mm256_and_si256(both_hi, low);
    TF_UNROLL for (int m = 0; m < M; m++) {
      const __m256i x = spread4(a + m * stride);
      add_unsigned(lo[m], first_lo, x), add_unsigned(hi[m], first_hi, x);
    }
    const __m256i last_lo = _mm256_and_si256(_mm256_srli_epi16(both_lo, 4), low);
    const __m256i last_hi = _mm256_and_si256(_mm256_srli_epi16(both_hi, 4), low);
    TF_UNROLL for (int m = 0; m < M; m++) {
      const __m256i x = spread4(a + m * stride + 4);
      add_unsigned(lo[m], last_lo, x), add_unsigned(hi[m], last_hi, x);
    }
  }
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = {_mm256_madd_epi16(lo[m], one), _mm256_madd_epi16(hi[m], one)};
}

template <int M>
static inline void whole_sums4(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  part_sums4(c, a, stride, w, std::min(inputs, 32));
  for (int i = 32; i < inputs; i += 32) {
    I16 part[M];
    part_sums4(part, a + i, stride, w + i * 8, std::min(inputs - i, 32));
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = c[m] + part[m];
  }
}

template <int M>
static inline void whole_sums8(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i lo[M], hi[M];
  TF_UNROLL for (int m = 0; m < M; m++) lo[m] = hi[m] = _mm256_setzero_si256();
  for (int i = 0; i < inputs; i += 4, a += 4, w += 64) {
    prefetch(w + AHEAD);
    const __m256i code_lo = load_bytes(w), code_hi = load_bytes(w + 32);
    const __m256i size_lo = _mm256_abs_epi8(code_lo), size_hi = _mm256_abs_epi8(code_hi);
    TF_UNROLL for (int m = 0; m < M; m++) {
      const __m256i x = spread4(a + m * stride);
      add_signed(lo[m], size_lo, code_lo, x, one), add_signed(hi[m], size_hi, code_hi, x, one);
    }
  }
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = {lo[m], hi[m]};
}

template <int BITS, int M>
static inline void whole_sums(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  if constexpr (BITS == 8) whole_sums8(c, a, stride, w, inputs);
  else whole_sums4(c, a, stride, w, inputs);
}
