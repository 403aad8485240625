// Register tiles, and panels made of weights as they lie in a checkpoint.
#include "tiles.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE = 12;                   // rows of a register tile: 12 x 32 outputs fill 24 of 32 registers
constexpr int WIDE = 2;                    // panels of a register tile
#else
constexpr int TILE = 6;                    // 6 x 16 outputs fill 12 of 16 registers
constexpr int WIDE = 1;
#endif

// tile[m][p] (+)= a[m, 0..k) . panels; a register tile of M rows by P panels.
template <int M, int P>
inline void tile(const float* __restrict a, int64_t a_stride, const float* __restrict panel, int64_t panel_stride, int k,
                 float* __restrict sum, int64_t sum_stride, bool first) {
  V16 c[M][P];
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = first ? all(0.0f) : load(sum + m * sum_stride + p * LANES);
  for (int i = 0; i < k; i++) {
    V16 w[P];
    TF_UNROLL for (int p = 0; p < P; p++) w[p] = load(panel + p * panel_stride + i * LANES);
    TF_UNROLL for (int m = 0; m < M; m++) {
      const V16 x = all(a[m * a_stride + i]);
      TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = fma(x, w[p], c[m][p]);
    }
  }
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) store(sum + m * sum_stride + p * LANES, c[m][p]);
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int, float*, int64_t, bool);

template <int P, int... M>
constexpr void tiles_of(Tile* to, std::integer_sequence<int, M...>) {
  ((to[M] = [](const float* a, int64_t as, const float* w, int64_t ws, int k, float* c, int64_t cs, bool first) {
     tile<M + 1, P>(a, as, w, ws, k, c, cs, first);
   }),
   ...);
}

struct Tiles {
  Tile one[TILE], wide[TILE], four[3];  // by rows - 1, for one panel, for WIDE panels, and for four where rows are few
  Tiles() {
    tiles_of<1>(one, std::make_integer_sequence<int, TILE>());
    tiles_of<WIDE>(wide, std::make_integer_sequence<int, TILE>());
    tiles_of<4>(four, std::make_integer_sequence<int, 3>());
  }
};
const Tiles tiles;

// Sixteen rows of w from `row` on, inner numbers k0 to k0+k-1, as a panel; rows past the last are zero.
template <class W>
void fill_panel(const W* w, int64_t stride, int64_t row, int64_t rows, int k0, int k, float* panel) {
  const W* from = w + row * stride + k0;
  const int count = int(std::min<int64_t>(LANES, rows - row));
  int i = 0;
  if (count == LANES)
    for (; i + 16 <= k; i += 16) transpose16(from + i, stride, panel + i * LANES);
  for (; i < k; i++)
    for (int j = 0; j < LANES; j++) {
      if constexpr (sizeof(W) == 2) panel[i * LANES + j] = j < count ? widen(from[j * stride + i]) : 0.0f;
      else panel[i * LANES + j] = j < count ? from[j * stride + i] : 0.0f;
    }
}

}  // namespace

void multiply(const float* a, int64_t a_stride, int m, const float* panels, int count, int k, float* sum, bool first) {
  const int64_t panel_stride = int64_t(SLAB) * LANES, sum_stride = int64_t(count) * LANES;
  int p = 0;
  for (; m <= 3 && p + 4 <= count; p += 4)
    tiles.four[m - 1](a, a_stride, panels + p * panel_stride, panel_stride, k, sum + p * LANES, sum_stride, first);
  const int wide = count - (count - p) % WIDE;
  for (; p < wide; p += WIDE)
    for (int row = 0; row < m; row += TILE)
      tiles.wide[std::min(TILE, m - row) - 1](a + row * a_stride, a_stride, panels + p * panel_stride, panel_stride, k,
                                              sum + row * sum_stride + p * LANES, sum_stride, first);
  for (; p < count; p++)
    for (int row = 0; row < m; row += TILE)
      tiles.one[std::min(TILE, m - row) - 1](a + row * a_stride, a_stride, panels + p * panel_stride, panel_stride, k,
                                             sum + row * sum_stride + p * LANES, sum_stride, first);
}

void sum_up(const Rows& rows, const Panels& panels, int k, Room& room, const void* w, Type type, int64_t w_stride,
            int64_t rows_of_w) {
  if (type == Type::bf16)
    sum_up(rows, panels, k, room, [&](int64_t column, int k0, int count, float* to) {
      fill_panel(static_cast<const uint16_t*>(w), w_stride, column, rows_of_w, k0, count, to);
    });
  else
    sum_up(rows, panels, k, room, [&](int64_t column, int k0, int count, float* to) {
      fill_panel(static_cast<const float*>(w), w_stride, column, rows_of_w, k0, count, to);
    });
}
