// Rounding activations to int8 by row and group, as products with quantized weights take them.
#include "across.h"
#include "stages.h"

namespace {

constexpr float SMALLEST = 7.8886090522101180541e-31f;  // 2^-100: a group whose largest number is below counts as zeros

// At most sixteen groups of a row, from group `g0` on. A group with a number that is not finite has codes 0 and scale NaN.
void round_groups(const Quantize& it, int64_t row, int g0, int count) {
  const float* a = it.a + row * it.a_stride;
  int8_t* codes = it.out.codes + row * it.out.stride;
  Square sizes = {}, faults = {}, codes_sums = {};
  for (int j = 0; j < count; j++) {
    V16 most = all(0.0f), fault = all(0.0f);
    for (int i = (g0 + j) * it.group, to = std::min(it.k, i + it.group); i < to; i += LANES) {
      const V16 size = magnitude(load(a + i, to - i));
      most = max(most, size);
      fault = fault + size * all(0.0f);  // 0, or NaN where a number is not finite
    }
    store(sizes.row[j], most), store(faults.row[j], fault);
  }
  const V16 top = largest_across(sizes), fault = total_across(faults), zero = all(0.0f), least = all(SMALLEST);
  alignas(64) float inverse[LANES], scale[LANES], wrong[LANES], sum[LANES];
  store(inverse, where_less(least, top, all(127.0f) / top, zero));
  store(scale, where_less(least, top, top / all(127.0f), zero) + fault);
  store(wrong, fault);
  for (int j = 0; j < count; j++) {
    V16 total = zero;
    const int from = (g0 + j) * it.group, end = from + it.group, to = wrong[j] == 0.0f ? std::min(it.k, end) : from;
    for (int i = from; i < end; i += LANES) {
      const V16 code = i < to ? nearest(load(a + i, to - i) * all(inverse[j])) : zero;
      total = total + code;
      store_s8(codes + i, code);
    }
    store(codes_sums.row[j], total);
  }
  store(sum, total_across(codes_sums));  // whole numbers below 2^24: exact in any order
  for (int j = 0; j < count; j++) {
    it.out.scales[row * it.out.groups + g0 + j] = scale[j];
    it.out.sums[row * it.out.groups + g0 + j] = int32_t(sum[j]);
  }
}

}  // namespace

void run(const Quantize& it, Crew& crew) {
  const int64_t rows = *it.rows, parts = divide_up(it.out.groups, LANES);
  for (int64_t i; (i = crew.take()) < rows * parts;) {
    const int g0 = int(i % parts) * LANES;
    round_groups(it, i / parts, g0, std::min(LANES, it.out.groups - g0));
  }
}

TF_STAGE(Quantize)
