// Whole numbers with AVX-512 and VNNI: four products and their sum in one instruction, of unsigned codes by signed
// activations; the sign bit of int8 codes is turned over, which adds 128 to each.
#pragma once
#include <immintrin.h>

#include <cstdint>

struct I16 {
  __m512i v;
};

constexpr int WHOLE_ROWS = 12;  // two sums for each row hide the instruction's latency where rows are few
template <int BITS>
constexpr int LIFT = BITS == 8 ? 128 : 0;

static inline I16 all_whole(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I16 operator-(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I16 operator*(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
template <int N>
static inline I16 times(I16 x) {  // a power of two
  return {_mm512_slli_epi32(x.v, __builtin_ctz(N))};
}
static inline V16 to_float(I16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
static inline I16 load_whole_s8(const int8_t* from) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}

static inline I16 load_words(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }  // four bytes in each lane
// BITS of each lane from bit FIRST on, int8 with its sign.
template <int BITS, int FIRST>
static inline I16 code_in(I16 x) {
  const __m512i top = _mm512_slli_epi32(x.v, 32 - BITS - FIRST);
  if constexpr (BITS == 8) return {_mm512_srai_epi32(top, 32 - BITS)};
  else return {_mm512_srli_epi32(top, 32 - BITS)};
}

// The byte of each lane from bit FIRST on, an e4m3 number: its bits are those of a float that is 2^120 times too small.
template <int FIRST>
static inline V16 fp8_in(I16 x) {
  const __m512i top = _mm512_slli_epi32(x.v, 24 - FIRST), sign = _mm512_and_si512(top, _mm512_set1_epi32(1u << 31));
  const __m512i rest = _mm512_srli_epi32(_mm512_and_si512(top, _mm512_set1_epi32(0x7f << 24)), 4);
  return {_mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, rest)), _mm512_set1_ps(FP8_LIFT))};
}

// GCC 12 copies registers around the intrinsic, whose sum comes in and goes out; said in assembly it stays in place.
static inline void add_dots(__m512i& sum, __m512i codes, const int8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int32_t(*)[1]>(four)));
}

template <int BITS, int M>
static inline void whole_sums(I16 (&c)[M], const int8_t* a, int64_t stride, const uint8_t* w, int inputs) {
  constexpr int inner = BITS == 8 ? 4 : 8;
  const __m512i sign = _mm512_set1_epi8(char(0x80)), low = _mm512_set1_epi8(15);
  __m512i even[M], odd[M];
  TF_UNROLL for (int m = 0; m < M; m++) even[m] = odd[m] = _mm512_setzero_si512();
  for (int i = 0; i < inputs; i += inner, a += inner, w += 64) {
    prefetch(w + AHEAD);
    const __m512i codes = _mm512_loadu_si512(w);
    if constexpr (BITS == 8) {
      const __m512i lifted = _mm512_xor_si512(codes, sign);
      TF_UNROLL for (int m = 0; m < M; m++) add_dots(even[m], lifted, a + m * stride);
    } else {
      const __m512i first = _mm512_and_si512(codes, low), last = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
      TF_UNROLL for (int m = 0; m < M; m++) add_dots(even[m], first, a + m * stride);
      TF_UNROLL for (int m = 0; m < M; m++) add_dots(odd[m], last, a + m * stride + 4);
    }
  }
  TF_UNROLL for (int m = 0; m < M; m++) c[m].v = BITS == 8 ? even[m] : _mm512_add_epi32(even[m], odd[m]);
}
