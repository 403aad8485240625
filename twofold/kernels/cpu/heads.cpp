// Queries and keys made ready: clip, normalise each head, turn by position; then keys and values go to the cache.
//
//   qkv of a token   │ q0 q1 ... │ k0 k1 .. │ v0 v1 .. │      a piece of work is some tokens of one head, so that the
//                      clip, norm, turn       clip            keys of neighbouring tokens fill a panel together
#include <algorithm>

#include "cache.h"
#include "normalise.h"
#include "stages.h"

namespace {

constexpr int64_t AT_ONCE = 2048;  // numbers of one piece of work, about

void clip(float* x, int width, float most) {
  for (int i = 0; i < width; i += LANES)
    store(x + i, min(all(most), max(all(-most), load(x + i, width - i))), width - i);
}

// (a, b) becomes (a cos - b sin, b cos + a sin), every product rounded: the bits of the reference.
void turn_halves(float* x, int pairs, const float* cos, const float* sin) {
  for (int i = 0; i < pairs; i += LANES) {
    const int count = pairs - i;
    const V16 a = load(x + i, count), b = load(x + pairs + i, count), c = load(cos + i, count), s = load(sin + i, count);
    store(x + i, a * c - b * s, count);
    store(x + pairs + i, b * c + a * s, count);
  }
}

void turn_neighbours(float* x, int pairs, const float* cos, const float* sin) {
  for (int i = 0; i < pairs; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

void make_ready(const Heads& it, float* x, int head, bool query, int64_t position) {
  const int dim = it.cache.dim;
  if (it.norm) {
    const NormKind kind = it.norm == 1 ? NormKind::rms : NormKind::layer;
    const int64_t at = it.per_head ? int64_t(head) * dim : 0;
    normalise(kind, x, dim, it.eps, it.offset, query ? it.q_weight : it.k_weight, query ? it.q_bias : it.k_bias, at, x);
  }
  if (!it.pairs) return;
  const float *cos = it.cos + position * it.pairs, *sin = it.sin + position * it.pairs;
  if (it.interleaved) turn_neighbours(x, it.pairs, cos, sin);
  else turn_halves(x, it.pairs, cos, sin);
}

}  // namespace

void run(const Heads& it, Crew& crew) {
  const Step& step = *it.step;
  const int dim = it.cache.dim, kv_heads = it.cache.kv_heads;
  const int64_t heads = it.heads + kv_heads, tokens = step.tokens;
  if (!tokens || !heads) return;
  const int64_t each = std::clamp<int64_t>(tokens * heads / (4 * crew.threads), 1, std::max<int64_t>(1, AT_ONCE / dim));
  const int64_t runs = divide_up(tokens, each);
  for (int64_t i; (i = crew.take()) < runs * heads;) {
    const int head = int(i / runs), kv = head - it.heads;
    const int64_t first = i % runs * each, last = std::min(tokens, first + each);
    int64_t span = kv < 0 ? 0 : std::upper_bound(step.first, step.first + step.spans + 1, first) - step.first - 1;
    for (int64_t t = first; t < last; t++) {
      float* x = it.qkv + t * it.qkv_stride + int64_t(head) * dim;
      if (it.clip != 0.0f) clip(x, dim, it.clip);
      make_ready(it, x, kv < 0 ? head : kv, kv < 0, step.positions[t]);
      if (kv < 0) continue;
      float* v = x + int64_t(kv_heads) * dim;
      if (it.clip != 0.0f) clip(v, dim, it.clip);
      while (step.first[span + 1] <= t) span++;
      write_token(it.cache, step.table + span * step.table_stride, step.positions[t], kv, x, v);
    }
  }
}

TF_STAGE(Heads)
