// Rounding: activations to int8 by row and group, as products with quantized weights take them.
#include <cmath>

#include "stages.h"

namespace {

constexpr float SMALLEST = 7.8886090522101180541e-31f;  // 2^-100: a group whose largest number is below counts as zeros

// Codes of one group: [from, to) of a row, filled up to whole groups of sixteen with zeros.
void round_group(const float* x, int from, int to, int end, int8_t* codes, float& scale, int32_t& sum) {
  V16 most = all(0.0f), bad = all(0.0f);
  for (int i = from; i < to; i += LANES) {
    const V16 size = magnitude(load(x + i, to - i));
    most = max(most, size);
    bad = bad + size * all(0.0f);  // 0, or NaN where a number is not finite
  }
  const float top = largest(most), wrong = total(bad);
  const bool some = top > SMALLEST && wrong == wrong;
  const V16 inverse = all(some ? 127.0f / top : 0.0f);
  scale = wrong != wrong ? wrong : some ? top / 127.0f : 0.0f;
  V16 sums = all(0.0f);
  for (int i = from; i < end; i += LANES) {
    const V16 code = some && i < to ? nearest(load(x + i, to - i) * inverse) : all(0.0f);
    sums = sums + code;
    store_s8(codes + i, code);
  }
  sum = int32_t(total(sums));  // whole numbers below 2^24: exact in any order
}

void round_row(const Quantize& it, int64_t row) {
  const Rounded& out = it.out;
  for (int g = 0; g < out.groups; g++) {
    const int from = g * it.group, end = from + it.group, to = std::min(it.k, end);
    round_group(it.a + row * it.a_stride, from, to, end, out.codes + row * out.stride,
                      out.scales[row * out.groups + g], out.sums[row * out.groups + g]);
  }
}

}  // namespace

void run(const Quantize& it, Crew& crew) {
  const int64_t rows = *it.rows;
  for (int64_t row; (row = crew.take()) < rows;) {
    round_row(it, row);
  }
}

TF_STAGE(Quantize)
