// Gradients of norms and activations: forward is done again from its input, the only thing that was kept.
//
//   rows        |<- 32 ->|<- 32 ->|<- 32 ->|      each run of 32 rows, whoever does it, has its own sums for weight and bias,
//   sums           s0       s1       s2           and a second stage adds these up in order: the same bits on every run
#include "math.h"
#include "normalise.h"
#include "rows.h"
#include "stages.h"

// dx of a norm over `groups` runs of `width` in each row, and for each run of rows the sums of dw and db.
struct NormGradient {
  const int32_t* rows;
  int32_t groups, width;
  NormKind kind;
  int32_t offset, per_group;
  float eps;
  Numbers weight;
  const float *x, *dy;  // [rows][groups * width]
  float* dx;
  float* sums;          // [runs of rows][2][width, of each group where groups have their own weights]
};

// out[i] = the sum over runs of sums[run][i], run after run.
struct SumRuns {
  int32_t runs, width;
  const float* sums;
  float* out;
};

// dx of act(x), or of act(gate) * up whose halves are side by side.
struct ActivationGradient {
  const int32_t* rows;
  int32_t width, act, gated, unused;
  const float* x;
  int64_t x_stride;
  const float* dy;  // [rows][width]
  float* dx;        // [rows][width, twice when gated]
};

namespace {

constexpr int64_t RUN = 32;

void norm_gradient(const NormGradient& it, int64_t at, int64_t weights_at, float* dw, float* db) {
  const float *x = it.x + at, *dy = it.dy + at;
  const bool layer = it.kind == NormKind::layer;
  const Spread spread = spread_of(it.kind, x, it.width, it.eps);
  const V16 mean = all(spread.mean), shrink = all(spread.shrink);
  const auto normal = [&](int i, int count) { return (load(x + i, count) - mean) * shrink; };
  const auto slope = [&](int i, int count) {
    const V16 d = load(dy + i, count);
    if (!it.weight) return d;
    const V16 w = it.weight.load16(weights_at + i, count);
    return d * (it.offset ? all(1.0f) + w : w);
  };
  V16 along = all(0.0f), level = all(0.0f);
  by_lanes(0, it.width, [&](int64_t i, int count) {
    const V16 d = load(dy + i, count), n = normal(i, count), g = slope(i, count);  // past the end d and g are 0
    along = fma(g, n, along), level = level + g;
    store(dw + i, fma(d, n, load(dw + i, count)), count);
    store(db + i, load(db + i, count) + d, count);
  });
  const V16 turn = all(total(along) / float(it.width)), lift = all(layer ? total(level) / float(it.width) : 0.0f);
  by_lanes(0, it.width, [&](int64_t i, int count) {
    store(it.dx + at + i, shrink * (slope(i, count) - lift - normal(i, count) * turn), count);
  });
}

// The derivative of an activation.
V16 derivative(V16 x, Act act) {
  const V16 zero = all(0.0f), one = all(1.0f), half = all(0.5f);
  switch (act) {
    case Act::none: return one;
    case Act::silu: {
      const V16 s = one / (one + exp(zero - x));
      return s * (one + x * (one - s));
    }
    case Act::gelu:
      return half * (one + erf(x * all(0.70710678118654752f))) + x * exp(all(-0.5f) * x * x) * all(0.39894228040143268f);
    case Act::gelu_tanh: {
      const V16 square = x * x, t = tanh(all(0.79788456080286536f) * fma(all(0.044715f), square * x, x));
      const V16 inner = all(0.79788456080286536f) * fma(all(0.134145f), square, one);
      return half * (one + t) + half * x * (one - t * t) * inner;
    }
    case Act::gelu_quick: {
      const V16 s = one / (one + exp(all(-1.702f) * x));
      return s * (one + all(1.702f) * x * (one - s));
    }
    case Act::relu: return where_less(zero, x, one, zero);
    case Act::relu2: return all(2.0f) * max(zero, x);
    case Act::sigmoid: {
      const V16 s = one / (one + exp(zero - x));
      return s * (one - s);
    }
  }
  return one;
}

}  // namespace

void run(const NormGradient& it, Crew& crew) {
  const int64_t rows = *it.rows, whole = int64_t(it.groups) * it.width, weights = it.per_group ? whole : it.width;
  for (int64_t run; (run = crew.take()) * RUN < rows;) {
    float *dw = it.sums + run * 2 * weights, *db = dw + weights;
    std::fill(dw, dw + 2 * weights, 0.0f);
    for (int64_t row = run * RUN; row < std::min(rows, (run + 1) * RUN); row++)
      for (int64_t at = 0; at < whole; at += it.width) {
        const int64_t own = it.per_group ? at : 0;
        norm_gradient(it, row * whole + at, own, dw + own, db + own);
      }
  }
}

void run(const SumRuns& it, Crew& crew) {
  by_parts(crew, 1, it.width, [&](int64_t, int64_t from, int64_t to) {
    by_lanes(from, to, [&](int64_t i, int count) {
      V16 sum = all(0.0f);
      for (int64_t run = 0; run < it.runs; run++) sum = sum + load(it.sums + run * it.width + i, count);
      store(it.out + i, sum, count);
    });
  });
}

void run(const ActivationGradient& it, Crew& crew) {
  const Act act = Act(it.act);
  by_parts(crew, *it.rows, it.width, [&](int64_t row, int64_t from, int64_t to) {
    const float *x = it.x + row * it.x_stride, *dy = it.dy + row * it.width;
    float* dx = it.dx + row * it.width * (it.gated ? 2 : 1);
    by_lanes(from, to, [&](int64_t i, int count) {
      const V16 gate = load(x + i, count), d = load(dy + i, count);
      V16 slope = d * derivative(gate, act);
      if (it.gated) {
        slope = slope * load(x + it.width + i, count);
        store(dx + it.width + i, d * activation(gate, act), count);
      }
      store(dx + i, slope, count);
    });
  });
}

TF_STAGE(NormGradient)
TF_STAGE(SumRuns)
TF_STAGE(ActivationGradient)
