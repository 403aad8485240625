// AdamW over any number of tensors at once, and the sum of squares of all gradients.
//
//   shards     |---- a ----|-- b --|- c -|          each cut into pieces of 16,384 numbers; a thread takes the next piece
//   pieces     |0 |1 |2 |3 |4 |5 |6|7 |8 |
//
// Each number is read and written once: decay, moments, bias correction and the clip's factor together (the formula is
// torch.optim.AdamW's; Loshchilov and Hutter 2019). Plain loops: the compiler's vectors have the same bits.
#include <algorithm>
#include <cmath>

#include "stages.h"

struct Shard {
  float* weight;
  const float* grad;
  float *mean, *square;  // exponential averages of the gradient and of its square
  int64_t count;
  int64_t first;         // the shard's first piece
  float decay;           // 1 - rate * weight decay
  float rate;            // rate / (1 - beta1^step)
  float root;            // sqrt(1 - beta2^step)
  int32_t unused;
};

struct Adam {
  int32_t shards;
  float beta1, beta2, eps;
  float scale;  // what gradients are multiplied by first
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

// Numbers [0, count) of four arrays that share nothing; what does not change is a value, so that the loop is of vectors.
void update(float* __restrict weight, const float* __restrict grad, float* __restrict mean, float* __restrict square,
            int64_t count, float scale, float beta1, float beta2, float eps, float decay, float rate, float root) {
  const float one_1 = 1.0f - beta1, one_2 = 1.0f - beta2;
  for (int64_t i = 0; i < count; i++) {
    const float g = grad[i] * scale;
    const float m = mean[i] + one_1 * (g - mean[i]), v = beta2 * square[i] + one_2 * (g * g);
    mean[i] = m, square[i] = v;
    weight[i] = weight[i] * decay - rate * (m / (std::sqrt(v) / root + eps));
  }
}

}  // namespace

void run(const Adam& it, Crew& crew) {
  by_pieces(it.list, it.shards, crew, [&](const Shard& on, int64_t, int64_t from, int64_t to) {
    update(on.weight + from, on.grad + from, on.mean + from, on.square + from, to - from, it.scale, it.beta1, it.beta2,
           it.eps, on.decay, on.rate, on.root);
  });
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

TF_STAGE(Adam)
TF_STAGE(SquareSums)
