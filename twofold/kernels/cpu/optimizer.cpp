// Elementwise optimizers over any number of tensors at once, and the sum of squares of all gradients.
//
//   shards     |---- a ----|-- b --|- c -|          each cut into pieces of 16,384 numbers; a thread takes the next piece
//   pieces     |0 |1 |2 |3 |4 |5 |6|7 |8 |
//
// Each number is read and written once: decay, states, bias correction and the clip's factor together. The formulas are
// torch.optim's, and Lion's (Chen et al. 2023). Plain loops: the compiler's vectors have the same bits.
#include <algorithm>
#include <cmath>

#include "stages.h"

enum class Rule : int32_t { ADAMW, ADAM, SGD, MOMENTUM, NESTEROV, LION, ADAGRAD };

struct Shard {
  float* weight;
  const float* grad;
  float *state, *square;  // what the rule keeps of each number; null where it keeps less
  int64_t count;
  int64_t first;          // the shard's first piece
  float decay;            // ADAMW, LION: 1 - rate * weight decay; the others: weight decay, added to the gradient
  float rate;             // ADAMW, ADAM: rate / (1 - beta1^step)
  float root;             // ADAMW, ADAM: sqrt(1 - beta2^step)
  int32_t unused;
};

struct Update {
  int32_t shards;
  Rule rule;
  float beta1, beta2, eps;  // beta1 is also the momentum
  float scale;              // what gradients are multiplied by first
  int32_t shard_size;
  const Shard* list;
};

// Of each piece the sum of squares; pieces' sums are added up in order by whoever asked.
struct SquareSums {
  int32_t shards, shard_size;
  const Shard* list;
  double* sums;
};

namespace {

constexpr int64_t PIECE = 16384;

template <class F>
void by_pieces(const Shard* list, int32_t shards, Crew& crew, F f) {
  if (!shards) return;
  const int64_t pieces = list[shards - 1].first + divide_up(list[shards - 1].count, PIECE);
  for (int64_t piece; (piece = crew.take()) < pieces;) {
    const Shard* end = std::upper_bound(list, list + shards, piece, [](int64_t at, const Shard& it) { return at < it.first; });
    const Shard& it = end[-1];
    const int64_t from = (piece - it.first) * PIECE;
    f(it, piece, from, std::min(it.count, from + PIECE));
  }
}

// Numbers [0, count) of arrays that share nothing; what does not change is a value, so that the loop is of vectors.
template <Rule RULE>
void update(float* __restrict weight, const float* __restrict grad, float* __restrict state, float* __restrict square,
            int64_t count, float scale, float beta1, float beta2, float eps, float decay, float rate, float root) {
  const float one_1 = 1.0f - beta1, one_2 = 1.0f - beta2;
  for (int64_t i = 0; i < count; i++) {
    float w = weight[i], g = grad[i] * scale;
    if constexpr (RULE == Rule::ADAMW || RULE == Rule::LION) w = w * decay;
    else g = g + decay * w;
    if constexpr (RULE == Rule::ADAMW || RULE == Rule::ADAM) {
      const float m = state[i] + one_1 * (g - state[i]), v = beta2 * square[i] + one_2 * (g * g);
      state[i] = m, square[i] = v;
      w = w - rate * (m / (std::sqrt(v) / root + eps));
    } else if constexpr (RULE == Rule::LION) {
      const float m = state[i], c = m + one_1 * (g - m);
      state[i] = m + one_2 * (g - m);
      w = w - rate * float((c > 0.0f) - (c < 0.0f));
    } else if constexpr (RULE == Rule::ADAGRAD) {
      const float v = state[i] + g * g;
      state[i] = v;
      w = w - rate * (g / (std::sqrt(v) + eps));
    } else if constexpr (RULE == Rule::SGD) {
      w = w - rate * g;
    } else {
      const float m = beta1 * state[i] + g;
      state[i] = m;
      w = w - rate * (RULE == Rule::NESTEROV ? g + beta1 * m : m);
    }
    weight[i] = w;
  }
}

template <Rule RULE>
void update_all(const Update& it, Crew& crew) {
  by_pieces(it.list, it.shards, crew, [&](const Shard& on, int64_t, int64_t from, int64_t to) {
    update<RULE>(on.weight + from, on.grad + from, on.state ? on.state + from : nullptr,
                 on.square ? on.square + from : nullptr, to - from, it.scale, it.beta1, it.beta2, it.eps, on.decay,
                 on.rate, on.root);
  });
}

}  // namespace

void run(const Update& it, Crew& crew) {
  switch (it.rule) {
    case Rule::ADAMW: return update_all<Rule::ADAMW>(it, crew);
    case Rule::ADAM: return update_all<Rule::ADAM>(it, crew);
    case Rule::SGD: return update_all<Rule::SGD>(it, crew);
    case Rule::MOMENTUM: return update_all<Rule::MOMENTUM>(it, crew);
    case Rule::NESTEROV: return update_all<Rule::NESTEROV>(it, crew);
    case Rule::LION: return update_all<Rule::LION>(it, crew);
    case Rule::ADAGRAD: return update_all<Rule::ADAGRAD>(it, crew);
  }
}

void run(const SquareSums& it, Crew& crew) {
  by_pieces(it.list, it.shards, crew, [&](const Shard& on, int64_t piece, int64_t from, int64_t to) {
    double lane[16] = {};
    int64_t i = from;
    for (; i + 16 <= to; i += 16)
      for (int j = 0; j < 16; j++) lane[j] += double(on.grad[i + j]) * double(on.grad[i + j]);
    for (; i < to; i++) lane[i - (to - (to - from) % 16)] += double(on.grad[i]) * double(on.grad[i]);
    for (int half = 8; half; half /= 2)
      for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    it.sums[piece] = lane[0];
  });
}

TF_STAGE(Update)
TF_STAGE(SquareSums)
