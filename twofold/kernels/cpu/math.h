// Elementary functions of sixteen floats: one polynomial each, so that a number's result does not depend on where it
// lies in memory, nor on the processor. What is not a number stays so.
#pragma once
#include "simd.h"

// e^x: 0 below -87.3, at most e^88.3; about one unit in the last place (Cephes' polynomial).
static inline V16 exp(V16 x) {
  const V16 low = all(-87.3f), clamped = min(all(88.3f), max(low, x));
  const V16 n = nearest(clamped * all(1.44269504088896341f));
  V16 r = fma(n, all(-0.693359375f), clamped);
  r = fma(n, all(2.12194440e-4f), r);
  V16 y = all(1.9875691500e-4f);
  y = fma(y, r, all(1.3981999507e-3f));
  y = fma(y, r, all(8.3334519073e-3f));
  y = fma(y, r, all(4.1665795894e-2f));
  y = fma(y, r, all(1.6666665459e-1f));
  y = fma(y, r, all(5.0000001201e-1f));
  y = fma(y, r * r, r) + all(1.0f);
  return where_less(x, low, all(0.0f), y * power_of_two(n));
}

static inline float exp_one(float x) {
  alignas(64) float lane[LANES];
  store(lane, exp(all(x)));
  return lane[0];
}

// tanh: a polynomial near zero, where the exponential would lose digits (Cephes).
static inline V16 tanh(V16 x) {
  const V16 size = magnitude(x), square = x * x;
  V16 p = all(-5.70498872745e-3f);
  p = fma(p, square, all(2.06390887954e-2f));
  p = fma(p, square, all(-5.37397155531e-2f));
  p = fma(p, square, all(1.33314422036e-1f));
  p = fma(p, square, all(-3.33332819422e-1f));
  const V16 small = fma(p * square, x, x);
  const V16 large = all(1.0f) - all(2.0f) / (exp(size + size) + all(1.0f));
  const V16 negative = all(0.0f) - large;
  return where_less(size, all(0.625f), small, where_less(x, all(0.0f), negative, large));
}

// The error function as a quotient of polynomials on [-4, 4], where it reaches 1 in single precision.
static inline V16 erf(V16 x) {
  const V16 t = min(all(4.0f), max(all(-4.0f), x)), s = t * t;
  V16 p = all(-2.72614225801306e-10f);
  p = fma(p, s, all(2.77068142495902e-08f));
  p = fma(p, s, all(-2.10102402082508e-06f));
  p = fma(p, s, all(-5.69250639462346e-05f));
  p = fma(p, s, all(-7.34990630326855e-04f));
  p = fma(p, s, all(-2.95459980854025e-03f));
  p = fma(p, s, all(-1.60960333262415e-02f));
  V16 q = all(-1.45660718464996e-05f);
  q = fma(q, s, all(-2.13374055278905e-04f));
  q = fma(q, s, all(-1.68282697438203e-03f));
  q = fma(q, s, all(-7.37332916720468e-03f));
  q = fma(q, s, all(-1.42647390514189e-02f));
  return t * p / q;
}

enum class Act : int32_t { none = 0, silu = 1, gelu = 2, gelu_tanh = 3, gelu_quick = 4, relu = 5, relu2 = 6, sigmoid = 7 };

static inline V16 activation(V16 x, Act act) {
  const V16 one = all(1.0f), zero = all(0.0f);
  switch (act) {
    case Act::none: return x;
    case Act::silu: return x / (one + exp(zero - x));
    case Act::gelu: return all(0.5f) * x * (one + erf(x * all(0.70710678118654752f)));
    case Act::gelu_tanh: return all(0.5f) * x * (one + tanh(all(0.79788456080286536f) * fma(all(0.044715f), x * x * x, x)));
    case Act::gelu_quick: return x / (one + exp(all(-1.702f) * x));
    case Act::relu: return max(zero, x);
    case Act::relu2: return max(zero, x) * max(zero, x);
    case Act::sigmoid: return one / (one + exp(zero - x));
  }
  return x;
}
