// Root-mean-square and layer norm of one run of numbers: sixteen sums, one tree, whatever stands beside it.
#pragma once
#include <algorithm>

#include "stages.h"

struct Spread {
  float mean, shrink;  // (x - mean) * shrink is the norm; an rms norm's mean is 0
};

inline Spread spread_of(NormKind kind, const float* x, int width, float eps) {
  V16 sum = all(0.0f);
  float mean = 0.0f;
  if (kind == NormKind::layer) {
    for (int i = 0; i < width; i += LANES) sum = sum + load(x + i, width - i);
    mean = total(sum) / float(width);
    sum = all(0.0f);
  }
  for (int i = 0; i < width; i += LANES) {
    V16 d = load(x + i, width - i);
    if (kind == NormKind::layer) {
      d = d - all(mean);
      if (width - i < LANES) {  // lanes past the end hold nothing
        alignas(64) float part[LANES] = {};
        store(part, d, width - i);
        d = load(part);
      }
    }
    sum = fma(d, d, sum);
  }
  return {mean, 1.0f / std::sqrt(total(sum) / float(width) + eps)};
}

inline void normalise(NormKind kind, const float* x, int width, float eps, bool offset, const Numbers& weight,
                      const Numbers& bias, int64_t weights_at, float* out) {
  const Spread spread = spread_of(kind, x, width, eps);
  const V16 mean = all(spread.mean), shrink = all(spread.shrink);
  for (int i = 0; i < width; i += LANES) {
    const int count = std::min(LANES, width - i);
    V16 y = load(x + i, count);
    if (kind == NormKind::layer) y = y - mean;
    y = y * shrink;
    if (weight) {
      const V16 w = weight.load16(weights_at + i, count);
      y = y * (offset ? all(1.0f) + w : w);
    }
    if (bias) y = y + bias.load16(weights_at + i, count);
    store(out + i, y, count);
  }
}
