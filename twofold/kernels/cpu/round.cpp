// Weights rounded to codes while they are loaded, from rows as the checkpoint has them straight into panels.
//
//   scale, chosen first    symmetric: the longest weight reaches the last code, and int4's longer side its eighth step
//                          with zeros: least and largest reach the ends of the codes
//                          rounded away from zero to its own type, so that nothing falls off the end
//   code                   nearest(w / scale) + zero, ties to even
//
// The arithmetic is `quant/codes.py`'s, bit for bit.
#include <algorithm>
#include <cmath>

#include "across.h"
#include "stages.h"

// The stage, mirrored in `kernels/panels.py`: weights w[n, k] in fp32, bf16 or fp16 rounded to nearest into panels; `bad`
// becomes 1 where one is not finite.
struct RoundWeights {
  const void* w;
  int64_t w_stride;
  int32_t n, k;
  Type type;
  int32_t unused;
  Panels out;
  int32_t* bad;
};

namespace {

struct Codes {
  float least, most, idle;  // and the zero of symmetric codes
};

V16 clamp(V16 x, const Codes& codes) { return min(max(x, all(codes.least)), all(codes.most)); }  // not a number: least

uint16_t narrow_fp16(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65,536 and more
  if (size < 0x38800000) {                                  // below 2^-14: steps of 2^-24, which a sum with 1/2 rounds to
    float small;
    std::memcpy(&small, &size, 4);
    small += 0.5f;
    std::memcpy(&bits, &small, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  return uint16_t(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}

// Rounded to the scales' type, away from zero; `to` takes it, and what it is comes back.
float put_scale(const Numbers& scales, int64_t at, float scale) {
  if (scales.type == Type::fp32) {
    const_cast<float*>(static_cast<const float*>(scales.at))[at] = scale;
    return scale;
  }
  const bool brain = scales.type == Type::bf16;
  uint16_t half = brain ? narrow(scale) : narrow_fp16(scale);
  if (std::fabs(brain ? widen(half) : widen_fp16(half)) < std::fabs(scale)) half++;
  const_cast<uint16_t*>(static_cast<const uint16_t*>(scales.at))[at] = half;
  return brain ? widen(half) : widen_fp16(half);
}

V16 symmetric_scale(V16 low, V16 high, const Codes& codes) {
  const V16 least = all(codes.least - codes.idle), most = all(codes.most - codes.idle), zero = all(0.0f);
  const V16 upright = max(high / most, low / least), turned = max((zero - low) / most, high / (zero - least));
  return where_less(turned, upright, zero - turned, upright);
}

// Sixteen codes, the first `count` of them, of inputs from `k` on.
void put_codes(const Panels& out, uint8_t* panel, int lane, int k, int count, V16 codes) {
  alignas(16) int8_t code[LANES];
  store_s8(code, codes);
  if (out.bits == 8) {
    for (int j = 0; j < count; j += 4) std::memcpy(panel + int64_t(k + j) * 16 + lane * 4, code + j, 4);
    return;
  }
  for (int j = 0; j < count; j += 8) {
    uint32_t first, last;
    std::memcpy(&first, code + j, 4), std::memcpy(&last, code + j + 4, 4);
    first |= last << 4;
    std::memcpy(panel + int64_t(k + j) * 8 + lane * 4, &first, 4);
  }
}

// Sixteen rows of w; those past the last are empty.
struct Rows {
  Numbers row[LANES];
  int count;
};

// One group of sixteen rows: inputs [from, to), codes up to `end`; its scales and zeros go to `at`.
void round_group(const RoundWeights& it, const Codes& codes, const Rows& rows, int from, int to, int end, int64_t at,
                 uint8_t* panel, V16& bad) {
  Square depths = {}, heights = {};
  alignas(64) float scale[LANES], zero[LANES];
  for (int r = 0; r < rows.count; r++) {
    V16 low = all(0.0f), high = all(0.0f);
    for (int k = from; k < to; k += LANES) {
      const V16 w = rows.row[r].load16(k, to - k);
      low = min(low, w), high = max(high, w);
      bad = bad + w * all(0.0f);  // 0, or NaN where a weight is not finite
    }
    store(depths.row[r], all(0.0f) - low), store(heights.row[r], high);
  }
  const V16 low = all(0.0f) - largest_across(depths), high = largest_across(heights);
  const V16 wanted = it.out.zeros ? (high - low) / all(codes.most - codes.least) : symmetric_scale(low, high, codes);
  store(scale, wanted);
  for (int r = 0; r < LANES; r++) scale[r] = put_scale(it.out.scales, at + r, scale[r]);
  store(zero, all(codes.idle));
  if (it.out.zeros) {
    const V16 below = clamp(nearest(all(codes.least) - low / load(scale)), codes);
    store(zero, below);
    for (int r = 0; r < LANES; r++) {
      if (scale[r] == 0.0f) zero[r] = codes.idle;
      const_cast<int8_t*>(it.out.zeros)[at + r] = int8_t(zero[r]);
    }
  }
  for (int r = 0; r < LANES; r++) {
    const V16 divisor = all(scale[r] != 0.0f ? scale[r] : INFINITY), shift = all(zero[r]);
    for (int k = from; k < end; k += LANES) {
      const V16 w = r < rows.count && k < to ? rows.row[r].load16(k, to - k) : all(0.0f);
      put_codes(it.out, panel, r, k, std::min(LANES, end - k),
                clamp(nearest(w / divisor) + shift, codes));
    }
  }
}

}  // namespace

void run(const RoundWeights& it, Crew& crew) {
  const Panels& out = it.out;
  const Codes codes = out.bits == 4 ? Codes{0, 15, 8} : out.zeros ? Codes{-128, 127, 0} : Codes{-127, 127, 0};
  const int64_t size = it.type == Type::fp32 ? 4 : 2, panels = divide_up(it.n, LANES);
  V16 bad = all(0.0f);
  for (int64_t p; (p = crew.take()) < panels;) {
    Rows rows{{}, int(std::min<int64_t>(LANES, it.n - p * LANES))};
    for (int r = 0; r < rows.count; r++)
      rows.row[r] = {static_cast<const char*>(it.w) + (p * LANES + r) * it.w_stride * size, it.type, 0};
    uint8_t* panel = const_cast<uint8_t*>(out.codes) + p * out.inputs * 2 * out.bits;
    for (int g = 0; g < out.groups; g++) {
      const int from = g * out.group, end = from + out.group;
      round_group(it, codes, rows, from, std::min(it.k, end), end, (p * out.groups + g) * LANES, panel, bad);
    }
  }
  const float wrong = total(bad);
  if (wrong != wrong) __atomic_store_n(it.bad, 1, __ATOMIC_RELAXED);
}

TF_STAGE(RoundWeights)
