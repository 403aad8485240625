// V16: sixteen floats, whatever the processor has. The same sixteen lanes and the same trees everywhere, so that a
// result has the same bits with AVX2 (two registers), with AVX-512 (one) and in portable C++ (a loop).
//
// Lanes lie across outputs (or across the elements of a row), never across the inner dimension of a product.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define TF_UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

constexpr int LANES = 16;

// The first `count` lanes from memory, zero in the others.
static inline V16 load(const float* from, int count) {
  if (count >= LANES) return load(from);
  alignas(64) float part[LANES] = {};
  std::memcpy(part, from, sizeof(float) * (count > 0 ? count : 0));
  return load(part);
}

// The first `count` lanes to memory.
static inline void store(float* to, V16 x, int count) {
  if (count >= LANES) return store(to, x);
  alignas(64) float part[LANES];
  store(part, x);
  std::memcpy(to, part, sizeof(float) * (count > 0 ? count : 0));
}

static inline V16 load_bf16(const uint16_t* from, int count) {
  if (count >= LANES) return load_bf16(from);
  alignas(32) uint16_t part[LANES] = {};
  std::memcpy(part, from, sizeof(uint16_t) * (count > 0 ? count : 0));
  return load_bf16(part);
}

// bf16 is the upper half of a float; rounding is to nearest even, and NaN stays NaN.
static inline float widen(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// IEEE half precision, in integers: the same bits with and without F16C.
static inline float widen_fp16(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 0x1f, fraction = half & 0x3ff, bits;
  if (exponent == 0) {
    float value = float(fraction) * 5.9604644775390625e-8f;  // 2^-24, exact
    return sign ? -value : value;
  }
  bits = exponent == 31 ? sign | 0x7f800000 | (fraction << 13) : sign | ((exponent + 112) << 23) | (fraction << 13);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// e4m3: the bits of a number are those of a float that is 2^120 times too small, subnormals too. There is no infinity, and
// what stands for no number (0x7f) is never written.
constexpr float FP8_LIFT = 1329227995784915872903807060280344576.0f;  // 2^120

static inline float widen_fp8(uint8_t byte) {
  const uint32_t bits = uint32_t(byte & 0x80) << 24 | uint32_t(byte & 0x7f) << 20;
  float value;
  std::memcpy(&value, &bits, 4);
  return value * FP8_LIFT;
}

// To the nearest e4m3, ties to even, at most 448; of what is not a number nothing is promised.
static inline uint8_t narrow_fp8(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 24) & 0x80, size = bits & 0x7fffffff;
  if (size >= 0x43e00000) return uint8_t(sign | 0x7e);                                              // 448 and more
  if (size < 0x3c800000) return uint8_t(sign | uint32_t(std::nearbyintf(std::fabs(value) * 512.0f)));  // steps of 2^-9
  return uint8_t(sign | ((size + 0x7ffff + ((size >> 20) & 1) - 0x3c000000) >> 20));
}

static inline V16 load_fp16(const uint16_t* from, int count) {
  alignas(64) float part[LANES] = {};
#if defined(__F16C__)
  if (count >= LANES) return load_fp16(from);
#endif
  for (int i = 0; i < std::min(count, LANES); i++) part[i] = widen_fp16(from[i]);
  return load(part);
}
