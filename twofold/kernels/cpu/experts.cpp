// A mixture of experts around its products: who goes where, and what comes back.
//
//   rows      logits ──Route──▶ chosen 2 0 | 0 3 | 2 0        places, by expert      0 0 0 | 2 2 | 3
//                               weights                       ──Deal──▶ row          0 1 2 | 0 2 | 1
//   Grouped: gate_up with gathered rows, then down, place by place; Combine: each row's places, in expert order
#include <limits>

#include "math.h"
#include "rows.h"
#include "stages.h"

namespace {

// e^(x - most) of one row, and their sum: sixteen sums and one tree, as for a norm.
float exponentials(const float* logits, int count, float* out) {
  const V16 least = all(-std::numeric_limits<float>::infinity());
  V16 most = least, sum = all(0.0f);
  by_lanes(0, count, [&](int64_t i, int some) {
    store(out + i, least);
    store(out + i, load(logits + i, some), some);
    most = max(most, load(out + i));
  });
  const V16 top = all(largest(most));
  by_lanes(0, count, [&](int64_t i, int) {
    const V16 e = exp(load(out + i) - top);
    store(out + i, e);
    sum = sum + e;
  });
  return total(sum);
}

// The `wanted` largest, by insertion, so that of equal numbers the first stays ahead.
void best_of(const float* x, int count, int wanted, int32_t* best) {
  for (int i = 0, kept = 0; i < count; i++) {
    int at = kept;
    while (at > 0 && x[i] > x[best[at - 1]]) at--;
    if (at == wanted) continue;
    if (kept < wanted) kept++;
    for (int j = kept - 1; j > at; j--) best[j] = best[j - 1];
    best[at] = i;
  }
}

}  // namespace

void run(const Route& it, Crew& crew) {
  by_rows(crew, *it.rows, it.experts, [&](int64_t first, int64_t last) {
    const int64_t width = divide_up(it.experts, LANES) * LANES;
    float *e = crew.scratch->need<float>(2 * width), *merit = e + width;
    for (int64_t t = first; t < last; t++) {
      const float* logits = it.logits + t * it.logits_stride;
      float* weights = it.weights + t * it.top_k;
      int32_t* chosen = it.chosen + t * it.top_k;
      const float sum = exponentials(logits, it.experts, e);
      for (int i = 0; it.bias && i < it.experts; i++) merit[i] = e[i] / sum + it.bias[i];
      best_of(it.bias ? merit : logits, it.experts, it.top_k, chosen);
      float share = 0.0f;
      for (int c = 0; c < it.top_k; c++) share += weights[c] = e[chosen[c]] / sum;
      for (int c = 0; it.renormalise && c < it.top_k; c++) weights[c] /= share;
    }
  });
}

// A counting sort by one thread: a few microseconds beside milliseconds of products.
void run(const Deal& it, Crew& crew) {
  if (crew.take() != 0) return;
  const int64_t rows = *it.rows, pairs = rows * it.choices;
  int32_t* next = crew.scratch->need<int32_t>(std::max<int64_t>(it.groups, rows));
  std::fill_n(it.first, it.groups + 1, 0);
  for (int64_t i = 0; i < pairs; i++)
    if (it.chosen[i] >= 0) it.first[it.chosen[i] + 1]++;
  for (int g = 0; g < it.groups; g++) it.first[g + 1] += it.first[g];
  std::copy_n(it.first, it.groups, next);
  if (it.places) std::fill_n(it.places, pairs, -1);
  for (int64_t i = 0; i < pairs; i++) {
    if (it.chosen[i] < 0) continue;
    const int32_t place = next[it.chosen[i]]++;
    it.row[place] = int32_t(i / it.choices);
    if (it.pair) it.pair[place] = int32_t(i);
  }
  if (!it.places) return;
  std::fill_n(next, rows, 0);
  for (int32_t place = 0; place < it.first[it.groups]; place++) {
    const int64_t row = it.row[place];
    it.places[row * it.choices + next[row]++] = place;
  }
}

void run(const Combine& it, Crew& crew) {
  by_parts(crew, *it.rows, it.width, [&](int64_t row, int64_t from, int64_t to) {
    const int32_t* places = it.places + row * it.choices;
    by_lanes(from, to, [&](int64_t i, int count) {
      V16 sum = all(0.0f);
      for (int c = 0; c < it.choices && places[c] >= 0; c++)
        sum = sum + all(it.weights[it.pair[places[c]]]) * load(it.y + places[c] * it.y_stride + i, count);
      store(it.out + row * it.out_stride + i, sum, count);
    });
  });
}

void run(const Gate& it, Crew& crew) {
  by_parts(crew, *it.rows, it.width, [&](int64_t row, int64_t from, int64_t to) {
    const V16 shut = all(1.0f) + exp(all(-it.gate[row * it.gate_stride]));
    by_lanes(from, to, [&](int64_t i, int count) {
      const V16 y = load(it.y + row * it.y_stride + i, count) / shut;
      store(it.out + row * it.out_stride + i, load(it.x + row * it.x_stride + i, count) + y, count);
    });
  });
}

TF_STAGE(Route)
TF_STAGE(Deal)
TF_STAGE(Combine)
TF_STAGE(Gate)
