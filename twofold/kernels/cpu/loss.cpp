// Log-probabilities of given tokens, and their gradient, from logits of a piece of the vocabulary at a time.
//
//   forward    logits[rows][first .. first+width) ─▶ taken into each row's (most, sum); the target's logit is noted on the
//              way; the last piece turns these into log p(target)
//   backward   the same logits, made again or kept ─▶ upstream * ([it is the target] - p), in place
//
// Whoever runs both piece by piece never holds the logits of the whole vocabulary (Cut Cross-Entropy, Wijmans et al. 2024).
#include "logsum.h"
#include "stages.h"

// Takes logits of the vocabulary's tokens `first` (a multiple of 1024) and on into each row's sum; the piece that is `last`
// gives each row's log-probability of its target.
struct Likelihood {
  const int32_t* rows;
  int32_t width, first, last;
  float multiplier, softcap, temperature;  // 0: none
  const float* x;
  int64_t x_stride;
  const int64_t* targets;  // [rows], ids in the whole vocabulary
  LogSum* sums;            // [rows], carried from piece to piece, as are the targets' logits
  float* logits;
  float* out;              // [rows]
};

// The same logits become the gradient of upstream * log p(target).
struct LikelihoodGradient {
  const int32_t* rows;
  int32_t width, first;
  float multiplier, softcap, temperature;
  float* x;
  int64_t x_stride;
  const int64_t* targets;
  const LogSum* sums;
  const float* upstream;  // [rows]
};

namespace {

// Scores as the model means them: multiplied, then capped.
inline V16 shaped(V16 x, float multiplier, float softcap) {
  if (multiplier != 0.0f) x = x * all(multiplier);
  if (softcap != 0.0f) x = all(softcap) * tanh(x / all(softcap));
  return x;
}

// Logits whose softmax is sampled from: the sampler's own arithmetic, so that both have the same bits.
inline V16 cooled(V16 x, float temperature) {
  return temperature != 0.0f ? x / all(temperature) : x;
}

}  // namespace

void run(const Likelihood& it, Crew& crew) {
  const int64_t rows = *it.rows;
  const bool plain = it.multiplier == 0.0f && it.softcap == 0.0f && it.temperature == 0.0f;
  float* block = nullptr;
  for (int64_t row; (row = crew.take()) < rows;) {
    const float* x = it.x + row * it.x_stride;
    LogSum& sum = it.sums[row];
    if (it.first == 0) sum = NOTHING;
    const int64_t target = it.targets[row] - it.first;
    for (int64_t at = 0; at < it.width; at += FOLD) {
      const int64_t count = std::min<int64_t>(FOLD, it.width - at);
      const float* y = x + at;
      if (!plain) {
        if (!block) block = crew.scratch->need<float>(FOLD);
        for (int64_t i = 0; i < count; i += LANES)
          store(block + i, cooled(shaped(load(y + i, int(count - i)), it.multiplier, it.softcap), it.temperature));
        y = block;
      }
      take_in(sum, y, count);
      if (target >= at && target < at + count) it.logits[row] = y[target - at];
    }
    if (it.last) it.out[row] = log_probability(sum, it.logits[row]);
  }
}

void run(const LikelihoodGradient& it, Crew& crew) {
  const int64_t rows = *it.rows;
  for (int64_t row; (row = crew.take()) < rows;) {
    float* x = it.x + row * it.x_stride;
    const LogSum& sum = it.sums[row];
    const float upstream = it.upstream[row];
    const V16 most = all(sum.most), share = all(float(-double(upstream) / sum.sum)), one = all(1.0f);
    const V16 cap = all(it.softcap), multiplier = all(it.multiplier);
    const int64_t target = it.targets[row] - it.first;
    alignas(64) float lane[LANES];
    for (int64_t i = 0; i < it.width; i += LANES) {
      const int count = int(std::min<int64_t>(LANES, it.width - i));
      const V16 y = shaped(load(x + i, count), it.multiplier, it.softcap);
      V16 slope = exp(cooled(y, it.temperature) - most) * share;
      if (target >= i && target < i + LANES) {
        store(lane, slope);
        lane[target - i] = lane[target - i] + upstream;
        slope = load(lane);
      }
      if (it.temperature != 0.0f) slope = slope / all(it.temperature);
      if (it.softcap != 0.0f) slope = slope * (one - (y / cap) * (y / cap));
      if (it.multiplier != 0.0f) slope = slope * multiplier;
      store(x + i, slope, count);
    }
  }
}

TF_STAGE(Likelihood)
TF_STAGE(LikelihoodGradient)
