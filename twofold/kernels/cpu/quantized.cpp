// Products with quantized weights, w = scale * (code - zero), from panels.
//
// Rounded activations:   for each group, in order:  c = sum of a * code                 whole numbers, exact (whole.h)
//                                                   out += float(c - zero * sum(a)) * (scale_w * scale_a)     one fma
// Float activations:     sixteen outputs by a slab of inputs are widened into a panel of floats, then as linear.cpp.
//
// Groups are folded in increasing order by one accumulator, so a row's bits are its own.
#include "quantized.h"

#include "whole.h"
#if defined(__AMX_INT8__)
#include "whole_amx.h"
#endif

namespace {

// What symmetric codes stand above zero, lifted: a power of two, or nothing.
template <int BITS>
constexpr int IDLE = LIFT<BITS> + (BITS == 4 ? 8 : 0);

// M rows from `row` on by one panel; GROUP is 32, or 0 for groups of any size.
template <int BITS, int GROUP, int M>
void multiply_tile(const Rounded& x, int64_t row, const Panels& w, int64_t panel, float* sum, int64_t sum_stride) {
  const int groups = w.groups, group = GROUP ? GROUP : w.group, stride = x.stride;
  const int8_t *a = x.codes + row * stride, *zeros = w.zeros ? w.zeros + panel * groups * LANES : nullptr;
  const float* a_scales = x.scales + row * groups;
  const int32_t* a_sums = x.sums + row * groups;
  const uint8_t* codes = w.codes + panel * w.inputs * 2 * BITS;
  const Numbers scales = w.scales;
  alignas(64) float folded[M][LANES] = {};
  for (int g = 0; g < groups; g++, a_scales++, a_sums++) {
    I16 c[M];
    whole_sums<BITS, M>(c, a, stride, codes, group);
    a += group, codes += group * 2 * BITS;
    if (zeros) {
      const I16 zero = load_whole_s8(zeros + g * LANES) + all_whole(LIFT<BITS>);
      TF_UNROLL for (int m = 0; m < M; m++) c[m] = c[m] - zero * all_whole(a_sums[m * groups]);
    } else if constexpr (IDLE<BITS> != 0) {
      TF_UNROLL for (int m = 0; m < M; m++) c[m] = c[m] - times<IDLE<BITS>>(all_whole(a_sums[m * groups]));
    }
    const V16 scale = scales.load16((panel * groups + g) * LANES);
    TF_UNROLL for (int m = 0; m < M; m++)
      store(folded[m], fma(to_float(c[m]), scale * all(a_scales[m * groups]), load(folded[m])));
  }
  TF_UNROLL for (int m = 0; m < M; m++) store(sum + m * sum_stride, load(folded[m]));
}

using WholeTile = void (*)(const Rounded&, int64_t, const Panels&, int64_t, float*, int64_t);

template <int BITS, int GROUP, int... M>
constexpr void whole_tiles_of(WholeTile* to, std::integer_sequence<int, M...>) {
  ((to[M] = multiply_tile<BITS, GROUP, M + 1>), ...);
}

struct WholeTiles {
  WholeTile by_rows[2][2][WHOLE_ROWS];  // [int4][groups of 32][rows - 1]
  WholeTiles() {
    constexpr auto rows = std::make_integer_sequence<int, WHOLE_ROWS>();
    whole_tiles_of<8, 0>(by_rows[0][0], rows), whole_tiles_of<8, 32>(by_rows[0][1], rows);
    whole_tiles_of<4, 0>(by_rows[1][0], rows), whole_tiles_of<4, 32>(by_rows[1][1], rows);
  }
};
const WholeTiles whole_tiles;

// Codes of one step, 64 bytes of a panel, widened: 4 inputs of 8 bits, 8 of int4.
enum class Codes { whole, offset, floats };

template <int BITS, Codes KIND, int... J>
inline void widen_step(const uint8_t* codes, I16 zero, V16 offset, V16 scale, float* to, std::integer_sequence<int, J...>) {
  const I16 words = load_words(codes);
  if constexpr (KIND == Codes::floats) (store(to + J * LANES, fp8_in<8 * J>(words) * scale), ...);
  else if constexpr (KIND == Codes::offset && BITS == 8)
    (store(to + J * LANES, to_float(code_in<8, 8 * J>(words)) * scale + offset), ...);
  else if constexpr (KIND == Codes::offset)
    (store(to + J * LANES, to_float(code_in<4, (J % 4) * 8 + (J / 4) * 4>(words)) * scale + offset), ...);
  else if constexpr (BITS == 8) (store(to + J * LANES, to_float(code_in<8, 8 * J>(words) - zero) * scale), ...);
  else (store(to + J * LANES, to_float(code_in<4, (J % 4) * 8 + (J / 4) * 4>(words) - zero) * scale), ...);
}

template <int BITS, Codes KIND>
void widen_panel(const Panels& w, int64_t panel, int k0, int k, float* to) {
  constexpr int inner = BITS == 8 ? 4 : 8;
  const uint8_t* codes = w.codes + (panel * w.inputs + k0) * 2 * BITS;
  for (int i = k0; i < k0 + k;) {
    const int64_t at = (panel * w.groups + i / w.group) * LANES;
    const I16 zero = w.zeros ? load_whole_s8(w.zeros + at) : all_whole(BITS == 8 ? 0 : 8);
    const V16 scale = w.scales.load16(at), offset = KIND == Codes::offset ? load(w.offsets + at) : all(0.0f);
    const int end = std::min(k0 + k, (i / w.group + 1) * w.group);
    for (; i < end; i += inner, codes += 64, to += inner * LANES) {
      prefetch(codes + AHEAD);
      widen_step<BITS, KIND>(codes, zero, offset, scale, to, std::make_integer_sequence<int, inner>());
    }
  }
}

#if defined(__AMX_INT8__)
// A panel, as int8, by the piece's rows, sixteen at a time.
void multiply_by_amx(AmxShape& shape, const Rounded& x, const Panels& w, const Piece& piece, int64_t panel,
                     const uint8_t* codes, float* sum, int64_t sum_stride) {
  alignas(64) int32_t c[AMX_ROWS][LANES];
  for (int m0 = 0; m0 < piece.m; m0 += AMX_ROWS) {
    const int rows = std::min(AMX_ROWS, piece.m - m0);
    for (int g = 0; g < w.groups; g++) {
      const int64_t first = piece.m0 + m0, at = (panel * w.groups + g) * LANES;
      const int8_t* a = x.codes + first * x.stride + g * w.group;
      amx_sums(shape, c[0], a, x.stride, codes + int64_t(g) * w.group * LANES, rows, w.group);
      const I16 zero = w.zeros ? load_whole_s8(w.zeros + at) : all_whole(w.bits == 8 ? 0 : 8);
      const V16 scale = w.scales.load16(at);
      for (int m = 0; m < rows; m++) {
        const int64_t of_a = (first + m) * w.groups + g;
        const I16 whole = load_words(reinterpret_cast<const uint8_t*>(c[m])) - zero * all_whole(x.sums[of_a]);
        float* to = sum + (m0 + m) * sum_stride;
        store(to, fma(to_float(whole), scale * all(x.scales[of_a]), g ? load(to) : all(0.0f)));
      }
    }
  }
}

void sums_by_amx(const Rounded& x, const Panels& w, const Piece& piece, float* sum) {
  thread_local Scratch scratch;
  uint8_t* bytes = w.bits == 4 ? scratch.need<uint8_t>(int64_t(w.inputs) * LANES) : nullptr;
  AmxShape shape;
  for (int p = 0; p < piece.panels; p++) {
    const int64_t panel = piece.column[p] / LANES;
    const uint8_t* codes = w.codes + panel * w.inputs * 2 * w.bits;
    if (bytes) spread_nibbles(codes, w.inputs, bytes);
    multiply_by_amx(shape, x, w, piece, panel, bytes ? bytes : codes, sum + p * LANES, int64_t(piece.panels) * LANES);
  }
  _tile_release();
}
#endif

}  // namespace

void sums_of_rounded(const Rounded& x, const Panels& w, const Piece& piece, float* sum) {
#if defined(__AMX_INT8__)
  if (piece.m >= AMX_FROM && amx_granted()) return sums_by_amx(x, w, piece, sum);
#endif
  const WholeTile* tile = whole_tiles.by_rows[w.bits == 4][w.group == 32];
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
  if (w.floats) widen_panel<8, Codes::floats>(w, panel, k0, k, to);
  else if (w.offsets && w.bits == 8) widen_panel<8, Codes::offset>(w, panel, k0, k, to);
  else if (w.offsets) widen_panel<4, Codes::offset>(w, panel, k0, k, to);
  else if (w.bits == 8) widen_panel<8, Codes::whole>(w, panel, k0, k, to);
  else widen_panel<4, Codes::whole>(w, panel, k0, k, to);
}

namespace {

void multiply_rounded(const QuantizedLinear& it, Crew& crew) {
  const int64_t rows = *it.rows, panels = divide_up(it.n, LANES);
  if (!rows) return;
  const int64_t most = rows_of_block(it.rounded), blocks = divide_up(rows, most);
  int64_t each = it.gated ? 4 : 8;
  while (each > 1 && blocks * divide_up(panels, each) < 16 * crew.threads) each /= 2;
  const int64_t per_block = divide_up(panels, each), pieces = blocks * per_block;
  float* sum = nullptr;
  for (int64_t i; (i = crew.take()) < pieces;) {
    if (!sum) sum = crew.scratch->need<float>(std::min(rows, most) * (it.gated ? 2 : 1) * each * LANES);
    const int64_t block = i / per_block, p0 = (i % per_block) * each;
    const int outputs = int(std::min(each, panels - p0));
    int64_t column[16];
    for (int p = 0; p < outputs; p++) column[p] = (p0 + p) * LANES, column[outputs + p] = it.n + (p0 + p) * LANES;
    const int64_t m0 = rows * block / blocks, m1 = rows * (block + 1) / blocks;
    const Piece piece{m0, int(m1 - m0), it.gated ? 2 * outputs : outputs, column, nullptr, 0};
    sums_of_rounded(it.rounded, it.w, piece, sum);
    finish(it, piece, outputs, sum);
  }
}

// A row of a table, `width` numbers of it: four bytes of every 64 of its panel.
void widen_row(const Panels& w, int64_t row, int width, float* to) {
  const int inner = w.bits == 8 ? 4 : 8, lane = int(row % LANES);
  const int64_t panel = row / LANES;
  const uint8_t* codes = w.codes + panel * w.inputs * 2 * w.bits + lane * 4;
  for (int g = 0; g * w.group < width; g++) {
    const int64_t at = (panel * w.groups + g) * LANES + lane;
    const int zero = w.zeros ? w.zeros[at] : w.bits == 8 ? 0 : 8;
    const float scale = w.scales.one(at);
    for (int i = g * w.group, end = std::min(width, i + w.group); i < end; i += inner, codes += 64) {
      int code[8];
      for (int j = 0; j < 4; j++) {
        code[j] = w.bits == 8 ? int8_t(codes[j]) : codes[j] & 15;
        code[4 + j] = codes[j] >> 4;
      }
      for (int j = 0; j < std::min(inner, end - i); j++) {
        if (w.floats) to[i + j] = widen_fp8(codes[j]) * scale;
        else if (w.offsets) to[i + j] = float(code[j]) * scale + w.offsets[at];
        else to[i + j] = float(code[j] - zero) * scale;
      }
    }
  }
}

}  // namespace

void run(const QuantizedLinear& it, Crew& crew) {
  if (!it.a) return multiply_rounded(it, crew);
  multiply_by_panels(it, crew, Widened{it.w});
}

void run(const QuantizedEmbed& it, Crew& crew) {
  const Step& step = *it.step;
  const Panels& table = it.table;
  for (int64_t t; (t = crew.take()) < step.tokens;) {
    float* out = it.out + t * it.out_stride;
    widen_row(table, step.ids[t], it.width, out);
    for (int i = 0; i < it.width; i += LANES) {
      const int count = std::min(LANES, it.width - i);
      V16 x = load(out + i, count);
      if (it.scale != 1.0f) x = x * all(it.scale);
      if (it.places) x = x + it.places.load16(int64_t(step.positions[t] + it.offset) * it.width + i, count);
      store(out + i, x, count);
    }
  }
}

TF_STAGE(QuantizedLinear)
TF_STAGE(QuantizedEmbed)
