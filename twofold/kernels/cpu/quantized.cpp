// Products with quantized weights, w = scale * (code - zero), from panels.
//
// Rounded activations:   for each group, in order:  c = sum of a * code                 whole numbers, exact (whole.h)
//                                                   out += float(c - zero * sum(a)) * (scale_w * scale_a)     one fma
// Float activations:     sixteen outputs by a slab of inputs are widened into a panel of floats, then as linear.cpp.
//
// Groups are folded in increasing order by one accumulator, so a row's bits are its own.
#include "quantized.h"

#include "whole.h"

namespace {

// M rows of the piece by one panel.
template <int BITS, int M>
void multiply_tile(const Rounded& x, int64_t row, const Panels& w, int64_t panel, float* sum, int64_t sum_stride) {
  const int8_t* a = x.codes + row * x.stride;
  const float* a_scales = x.scales + row * x.groups;
  const int32_t* a_sums = x.sums + row * x.groups;
  const uint8_t* codes = w.codes + panel * w.inputs * 2 * BITS;
  const int64_t at = panel * w.groups * LANES;
  constexpr int idle = LIFT<BITS> + (BITS == 8 ? 0 : 8);
  for (int g = 0; g < w.groups; g++) {
    I16 c[M];
    whole_sums<BITS, M>(c, a, x.stride, codes, w.group);
    a += w.group, codes += w.group * 2 * BITS;
    const V16 scale = w.scales.load16(at + g * LANES);
    if (w.zeros) {
      const I16 zero = load_whole_s8(w.zeros + at + g * LANES) - all_whole(-LIFT<BITS>);
      TF_UNROLL for (int m = 0; m < M; m++) c[m] = c[m] - zero * all_whole(a_sums[m * x.groups + g]);
    } else if constexpr (idle != 0) {
      TF_UNROLL for (int m = 0; m < M; m++) c[m] = c[m] - all_whole(idle * a_sums[m * x.groups + g]);
    }
    TF_UNROLL for (int m = 0; m < M; m++) {
      float* to = sum + m * sum_stride;
      store(to, fma(to_float(c[m]), scale * all(a_scales[m * x.groups + g]), g ? load(to) : all(0.0f)));
    }
  }
}

using WholeTile = void (*)(const Rounded&, int64_t, const Panels&, int64_t, float*, int64_t);

template <int BITS, int... M>
constexpr void whole_tiles_of(WholeTile* to, std::integer_sequence<int, M...>) {
  ((to[M] = multiply_tile<BITS, M + 1>), ...);
}

struct WholeTiles {
  WholeTile int8[WHOLE_ROWS], int4[WHOLE_ROWS];  // by rows - 1
  WholeTiles() {
    whole_tiles_of<8>(int8, std::make_integer_sequence<int, WHOLE_ROWS>());
    whole_tiles_of<4>(int4, std::make_integer_sequence<int, WHOLE_ROWS>());
  }
};
const WholeTiles whole_tiles;

// One output's code of input k.
inline int code_at(const Panels& w, int64_t panel, int lane, int k) {
  const int inner = w.bits == 8 ? 4 : 8;
  const uint8_t byte = w.codes[panel * w.inputs * 2 * w.bits + int64_t(k / inner) * 64 + lane * 4 + k % 4];
  return w.bits == 8 ? int8_t(byte) : k % 8 < 4 ? byte & 15 : byte >> 4;
}

}  // namespace

void sums_of_rounded(const Rounded& x, const Panels& w, const Piece& piece, float* sum) {
  const WholeTile* tile = w.bits == 8 ? whole_tiles.int8 : whole_tiles.int4;
  const int64_t sum_stride = int64_t(piece.panels) * LANES;
  for (int p = 0; p < piece.panels; p++)
    for (int row = 0; row < piece.m; row += WHOLE_ROWS)
      tile[std::min(WHOLE_ROWS, piece.m - row) - 1](x, piece.m0 + row, w, piece.column[p] / LANES,
                                                    sum + row * sum_stride + p * LANES, sum_stride);
}

int64_t rows_of_block(const Rounded& x) {
  constexpr int64_t BYTES = 192 << 10;  // of codes: they stay in the second-level cache
  return std::max<int64_t>(WHOLE_ROWS, BYTES / std::max(1, x.stride));
}

void widen_panel(const Panels& w, int64_t panel, int k0, int k, float* to) {
  for (int i = k0; i < k0 + k; i++, to += LANES) {
    const int64_t at = (panel * w.groups + i / w.group) * LANES;
    alignas(64) float code[LANES];
    for (int lane = 0; lane < LANES; lane++) code[lane] = float(code_at(w, panel, lane, i));
    const V16 zero = w.zeros ? load_s8(w.zeros + at) : all(w.bits == 8 ? 0.0f : 8.0f);
    store(to, (load(code) - zero) * w.scales.load16(at));
  }
}

namespace {

void multiply_rounded(const QuantizedLinear& it, Crew& crew) {
  const int64_t rows = *it.rows, panels = divide_up(it.n, LANES);
  if (!rows) return;
  const int64_t most = rows_of_block(it.rounded), blocks = divide_up(rows, most);
  int64_t each = it.gated ? 4 : 8;
  while (each > 1 && blocks * divide_up(panels, each) < 4 * crew.threads) each /= 2;
  const int64_t per_block = divide_up(panels, each), pieces = blocks * per_block;
  float* sum = nullptr;
  for (int64_t i; (i = crew.take()) < pieces;) {
    if (!sum) sum = crew.scratch->need<float>(std::min(rows, most) * (it.gated ? 2 : 1) * each * LANES);
    const int64_t block = i / per_block, p0 = (i % per_block) * each;
    const int outputs = int(std::min(each, panels - p0));
    int64_t column[16];
    for (int p = 0; p < outputs; p++) column[p] = (p0 + p) * LANES, column[outputs + p] = it.n + (p0 + p) * LANES;
    const int64_t m0 = rows * block / blocks, m1 = rows * (block + 1) / blocks;
    const Piece piece{m0, int(m1 - m0), it.gated ? 2 * outputs : outputs, column, nullptr};
    sums_of_rounded(it.rounded, it.w, piece, sum);
    finish(it, piece, outputs, sum);
  }
}

}  // namespace

void run(const QuantizedLinear& it, Crew& crew) {
  if (!it.a) return multiply_rounded(it, crew);
  multiply_by_panels(it, crew, [&](int64_t row, int k0, int k, int, float* to) { widen_panel(it.w, row / LANES, k0, k, to); });
}

void run(const QuantizedEmbed& it, Crew& crew) {
  const Step& step = *it.step;
  const Panels& table = it.table;
  for (int64_t t; (t = crew.take()) < step.tokens;) {
    const int64_t panel = step.ids[t] / LANES;
    const int lane = step.ids[t] % LANES;
    for (int i = 0; i < it.width; i += LANES) {
      const int count = std::min(LANES, it.width - i);
      alignas(64) float row[LANES] = {};
      for (int j = 0; j < count; j++) {
        const int64_t at = (panel * table.groups + (i + j) / table.group) * LANES + lane;
        const int zero = table.zeros ? table.zeros[at] : table.bits == 8 ? 0 : 8;
        row[j] = float(code_at(table, panel, lane, i + j) - zero) * table.scales.one(at);
      }
      V16 x = load(row);
      if (it.scale != 1.0f) x = x * all(it.scale);
      if (it.places) x = x + it.places.load16(int64_t(step.positions[t] + it.offset) * it.width + i, count);
      store(it.out + t * it.out_stride + i, x, count);
    }
  }
}

TF_STAGE(QuantizedLinear)
TF_STAGE(QuantizedEmbed)
