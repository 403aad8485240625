// Products of rows by panels: what every matrix product is made of, whatever its weights are kept as.
//
//   16 rows of w, a slab of k          a panel in cache            a tile of rows by sixteen or more outputs
//   ┌───────────── k ─┐                ┌ 16 ┐
//   │ w[n0]  ........ │   by `fill`    │ k0 │                     sum[m, n] += a[m, k] * panel[k][n], k after k,
//   │  ...            │  ────────────▶ │ k1 │   ───────────▶      by one accumulator for each (m, n)
//   │ w[n0+15]  ..... │                │ .. │
//   └─────────────────┘                └────┘
//
// Each output is one fp32 accumulator, added to by fma in increasing k. Slabs, tiles and threads only decide when, not in
// which order, so a row's bits are its own. The blocking is Goto and van de Geijn's (2008).
#pragma once
#include <algorithm>

#include "math.h"
#include "stages.h"

constexpr int SLAB = 256;            // inner numbers of one panel: 16 KB for 16 outputs
constexpr int ROWS = 192;            // rows of a piece of work: their slab stays in the second-level cache
constexpr int WIDTH = SLAB + LANES;  // a row of the slab's copy: not a power of two, so rows do not share cache sets
constexpr int MOST_PANELS = 16;      // of one piece

// The rows on the left: `count` of them from `from` on, or those that `index` lists.
struct Rows {
  const float* from;
  int64_t stride;
  const int32_t* index;
  int count;

  const float* operator[](int m) const { return from + (index ? index[m] : m) * stride; }
};

// The panels on the right: sixteen rows of w from column[p] on.
struct Panels {
  int count;
  int64_t column[MOST_PANELS];
};

// A thread's memory for one piece: panels[p][SLAB][16], slab[m][WIDTH], sum[m][p][16].
struct Room {
  float *panels, *slab, *sum;

  Room(Scratch& scratch, int64_t rows, int64_t count)
      : panels(scratch.need<float>(count * SLAB * LANES + rows * (WIDTH + count * LANES))),
        slab(panels + count * SLAB * LANES),
        sum(slab + rows * WIDTH) {}
};

// All panels of a slab against m rows; `first` begins the sums.
void multiply(const float* a, int64_t a_stride, int m, const float* panels, int count, int k, float* sum, bool first);

// room.sum = rows . panels; fill(column, k0, k, to) writes one panel: to[i][j] = w[column + j][k0 + i].
template <class Fill>
void sum_up(const Rows& rows, const Panels& panels, int k_end, Room& room, Fill fill) {
  if (k_end == 0) std::fill_n(room.sum, int64_t(rows.count) * panels.count * LANES, 0.0f);
  for (int k0 = 0; k0 < k_end; k0 += SLAB) {
    const int k = std::min(SLAB, k_end - k0);
    for (int p = 0; p < panels.count; p++) fill(panels.column[p], k0, k, room.panels + int64_t(p) * SLAB * LANES);
    const float* a = rows[0] + k0;
    int64_t stride = rows.stride;
    if (rows.count > 3 || (rows.index && rows.count > 1)) {
      for (int m = 0; m < rows.count; m++) std::memcpy(room.slab + m * WIDTH, rows[m] + k0, sizeof(float) * k);
      a = room.slab, stride = WIDTH;
    }
    multiply(a, stride, rows.count, room.panels, panels.count, k, room.sum, k0 == 0);
  }
}

// The same with weights as in the checkpoint: `rows_of_w` rows of k numbers, fp32 or bf16; beyond the last, zeros.
void sum_up(const Rows& rows, const Panels& panels, int k, Room& room, const void* w, Type type, int64_t w_stride,
            int64_t rows_of_w);

// Bias, activation and gate, then put(m, n, count, x) for each sixteen outputs of each row. Gated: the panels' second half
// is what the first half's gates open.
template <class Put>
void finish(const Rows& rows, const Panels& panels, const float* sum, int n, Act act, bool gated, const Numbers& bias,
            Put put) {
  const int outputs = gated ? panels.count / 2 : panels.count;
  for (int m = 0; m < rows.count; m++, sum += int64_t(panels.count) * LANES)
    for (int p = 0; p < outputs; p++) {
      const int64_t at = panels.column[p];
      const int count = int(std::min<int64_t>(LANES, n - at));
      V16 x = load(sum + p * LANES);
      if (bias) x = x + bias.load16(at, count);
      x = activation(x, act);
      if (gated) {
        V16 up = load(sum + (outputs + p) * LANES);
        if (bias) up = up + bias.load16(n + at, count);
        x = x * up;
      }
      put(m, at, count, x);
    }
}

// Panels p0 .. p0+outputs-1 of n outputs; gated, their partners n rows below too.
inline Panels panels_of(int64_t p0, int outputs, int64_t n, bool gated) {
  Panels panels{gated ? 2 * outputs : outputs, {}};
  for (int p = 0; p < outputs; p++) {
    panels.column[p] = (p0 + p) * LANES;
    if (gated) panels.column[outputs + p] = n + (p0 + p) * LANES;
  }
  return panels;
}
