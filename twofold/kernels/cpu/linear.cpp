// Products with weights as they lie in the checkpoint, [n, k] row by row, in fp32 or bf16.
//
//   16 rows of w, a slab of k          a panel in cache
//   ┌───────────── k ─┐                ┌ 16 ┐
//   │ w[n0]  ........ │   transposed   │ k0 │
//   │  ...            │  ────────────▶ │ k1 │   ───────────▶   tiles.h
//   │ w[n0+15]  ..... │                │ .. │
//   └─────────────────┘                └────┘
#include "tiles.h"

namespace {

// Sixteen rows of w from `row` on, inner numbers k0 to k0+k-1, as a panel; rows past the last are zero. What this thread
// reads next is fetched meanwhile: sixteen rows and more are too many streams for the processor to foresee.
template <class W>
void fill_panel(const W* w, int64_t stride, int64_t row, int64_t rows, int k0, int k, Ahead next, float* panel) {
  const W* from = w + row * stride + k0;
  const int count = int(std::min<int64_t>(LANES, rows - row));
  const int64_t ahead = next.rows * stride + next.k;
  constexpr int LINE = 64 / sizeof(W);
  int i = 0;
  if (count == LANES)
    for (; i + 16 <= k; i += 16) {
      if (i % LINE == 0)
        for (int j = 0; j < LANES; j++) prefetch(from + j * stride + i + ahead);
      transpose16(from + i, stride, panel + i * LANES);
    }
  for (; i < k; i++)
    for (int j = 0; j < LANES; j++) {
      if constexpr (sizeof(W) == 2) panel[i * LANES + j] = j < count ? widen(from[j * stride + i]) : 0.0f;
      else panel[i * LANES + j] = j < count ? from[j * stride + i] : 0.0f;
    }
}

template <class W>
void multiply_rows(const Linear& it, Crew& crew) {
  const W* w = static_cast<const W*>(it.w);
  const int64_t rows = it.gated ? 2 * int64_t(it.n) : it.n;
  multiply_by_panels(it, crew, [&](int64_t row, int k0, int k, Ahead next, float* panel) {
    fill_panel(w, it.w_stride, row, rows, k0, k, next, panel);
  });
}

}  // namespace

void run(const Linear& it, Crew& crew) {
  if (it.type == Type::bf16) multiply_rows<uint16_t>(it, crew);
  else multiply_rows<float>(it, crew);
}

TF_STAGE(Linear)
