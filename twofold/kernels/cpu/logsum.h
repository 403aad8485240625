// The one definition of a token's log-probability, for the engine's scores, the sampler and the trainer's loss:
//
//   logits of a row   |<-- 1024 -->|<-- 1024 -->|<-- 1024 -->|<- the rest ->|
//   each block            m, s          m, s         m, s          m, s         m the largest, s the sum of e^(x - m)
//   in order          (most, sum) takes a block in: sum = sum e^(most - new) + s e^(m - new), the sum in double
//   at the end        log p(token) = (x[token] - most) - log(sum)
//
// A block's sum has sixteen lanes and one tree. Blocks lie at multiples of 1024 of the vocabulary, so whoever has a few
// blocks of logits at a time gets the bits of whoever has them all.
#pragma once
#include <algorithm>
#include <cmath>

#include "math.h"

constexpr int64_t FOLD = 1024;

struct LogSum {
  float most, unused;
  double sum;
};

constexpr LogSum NOTHING{-INFINITY, 0.0f, 0.0};

// The first `count` lanes from memory, -infinity in the others.
static inline V16 load_or_nothing(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  alignas(64) float part[LANES];
  for (int i = 0; i < LANES; i++) part[i] = i < count ? from[i] : -INFINITY;
  return load(part);
}

static inline float largest_of(const float* x, int64_t width) {
  V16 most = all(-INFINITY);
  for (int64_t i = 0; i < width; i += LANES) most = max(most, load_or_nothing(x + i, width - i));
  return largest(most);
}

// Logarithm of a positive number in plain double arithmetic: 2 atanh((m - 1) / (m + 1)) + e log 2 for m 2^e near 1.
static inline double log_of(double x) {
  int e;
  double m = std::frexp(x, &e);
  if (m < 0.70710678118654752) m = m + m, e--;
  const double t = (m - 1.0) / (m + 1.0), s = t * t;
  double sum = 0.0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * s + 1.0 / k;
  return e * 0.69314718055994531 + 2.0 * t * sum;
}

// Take in blocks of logits that begin at a multiple of FOLD; what is not a number stays in the sum.
static inline void take_in(LogSum& so_far, const float* x, int64_t width) {
  for (int64_t at = 0; at < width; at += FOLD) {
    const int64_t count = std::min(FOLD, width - at);
    const float most = largest_of(x + at, count);
    if (most == -INFINITY) continue;
    const V16 shift = all(most);
    V16 sum = all(0.0f);
    for (int64_t i = 0; i < count; i += LANES) sum = sum + exp(load_or_nothing(x + at + i, count - i) - shift);
    const float least = std::min(so_far.most, most), now = so_far.most > most ? so_far.most : most;
    const double shrink = least == -INFINITY ? 0.0 : double(exp_one(least - now)), s = double(total(sum));
    so_far.sum = so_far.most > most ? so_far.sum + s * shrink : so_far.sum * shrink + s;
    so_far.most = now;
  }
}

static inline float log_probability(const LogSum& of, float logit) {
  return float((double(logit) - double(of.most)) - log_of(of.sum));
}
