// Tiles of fp32 products: rows of activations by panels of sixteen outputs, and what is done to the sums afterwards.
//
//   a panel in cache            a tile of rows by sixteen or more outputs
//   ┌ 16 ┐
//   │ k0 │                      out[m, n] += a[m, k] * panel[k][n], k after k,
//   │ k1 │   ───────────▶       by one accumulator for each (m, n)
//   │ .. │
//   └────┘
//
// Each output is one fp32 accumulator, added to by fma in increasing k. Slabs, tiles and threads only decide when, not in
// which order, so a row's bits are its own. The blocking is Goto and van de Geijn's (2008).
#pragma once
#include <algorithm>

#include "math.h"
#include "stages.h"

// One piece: rows [m0, m0+m), or those rows of `from`, by the panels of `columns`, each 16 outputs from a row of w on.
struct Piece {
  int64_t m0;
  int m, panels;
  const int64_t* column;  // [panels]
  const int32_t* from;    // null: the rows themselves
  int64_t following;      // the row of w where this thread's next piece most likely begins

  int64_t row(int i) const { return from ? from[m0 + i] : m0 + i; }
};

namespace {

constexpr int SLAB = 256;                  // inner numbers of one panel: 16 KB for 16 outputs
constexpr int FEW = 3, FEW_SLAB = 64;      // up to this many rows take FOUR panels at once: 4 KB each
constexpr int FOUR = 4;
constexpr int ROWS = 192;                  // rows of a piece of work: their slab stays in the second-level cache
constexpr int PANELS = 32;                 // panels of a piece at most: what its slab's copy costs is shared by them
constexpr int WIDTH = SLAB + LANES;        // a row of the slab's copy: not a power of two, so rows do not share cache sets
#if defined(__AVX512F__)
constexpr int TILE = 12;                   // rows of a register tile: 12 x 32 outputs fill 24 of 32 registers
constexpr int WIDE = 2;                    // panels of a register tile
#else
constexpr int TILE = 6;                    // 6 x 16 outputs fill 12 of 16 registers
constexpr int WIDE = 1;
#endif

// How a slab's products come to the sums: as the first, onward from what is there, or apart, and then added. A chain as long as
// the row is the definition of a forward product; gradients are nearer to the truth in chains of a slab.
enum class Begin { fresh, onward, apart };

// tile[m][p] (+)= a[m, 0..k) . panels; a register tile of M rows by P panels.
template <int M, int P>
inline void tile(const float* __restrict a, int64_t a_stride, const float* __restrict panel, int64_t panel_stride, int k,
                 float* __restrict sum, int64_t sum_stride, Begin begin) {
  V16 c[M][P];
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = begin == Begin::onward ? load(sum + m * sum_stride + p * LANES) : all(0.0f);
  for (int i = 0; i < k; i++) {
    V16 w[P];
    TF_UNROLL for (int p = 0; p < P; p++) w[p] = load(panel + p * panel_stride + i * LANES);
    TF_UNROLL for (int m = 0; m < M; m++) {
      const V16 x = all(a[m * a_stride + i]);
      TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = fma(x, w[p], c[m][p]);
    }
  }
  if (begin == Begin::apart)
    TF_UNROLL for (int m = 0; m < M; m++)
      TF_UNROLL for (int p = 0; p < P; p++) c[m][p] = load(sum + m * sum_stride + p * LANES) + c[m][p];
  TF_UNROLL for (int m = 0; m < M; m++)
    TF_UNROLL for (int p = 0; p < P; p++) store(sum + m * sum_stride + p * LANES, c[m][p]);
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int, float*, int64_t, Begin);

template <int P, int... M>
constexpr void tiles_of(Tile* to, std::integer_sequence<int, M...>) {
  ((to[M] = [](const float* a, int64_t as, const float* w, int64_t ws, int k, float* c, int64_t cs, Begin begin) {
     tile<M + 1, P>(a, as, w, ws, k, c, cs, begin);
   }),
   ...);
}

struct Tiles {
  Tile one[TILE], wide[TILE], four[FEW];  // by rows - 1, for one panel, for WIDE panels, and for four where rows are few
  Tiles() {
    tiles_of<1>(one, std::make_integer_sequence<int, TILE>());
    tiles_of<WIDE>(wide, std::make_integer_sequence<int, TILE>());
    tiles_of<FOUR>(four, std::make_integer_sequence<int, FEW>());
  }
};
inline const Tiles tiles;

// How many panels are multiplied together, of those that are left.
inline int side_by_side(int m, int left) { return m <= FEW && left >= FOUR ? FOUR : left >= WIDE ? WIDE : 1; }

// Panels side by side, as many as `side_by_side` says, against all rows of the piece, in tiles of about equal height: two
// rows alone take as long as four, since a sum waits for itself. Before each tile, `fetch(i, of)` asks for a part of what
// is needed next: memory brings it while the tile is multiplied.
template <class Fetch>
inline void multiply(const float* a, int64_t a_stride, int m, const float* panel, int64_t panel_stride, int panels, int k,
                     float* sum, int64_t sum_stride, Begin begin, Fetch fetch) {
  const Tile* of_rows = panels == 1 ? tiles.one : panels == FOUR ? tiles.four : tiles.wide;
  const int64_t many = divide_up(m, TILE);
  for (int64_t i = 0; i < many; i++) {
    const int64_t row = m * i / many, high = m * (i + 1) / many - row;
    fetch(i, many);
    of_rows[high - 1](a + row * a_stride, a_stride, panel, panel_stride, k, sum + row * sum_stride, sum_stride, begin);
  }
}

// Sixteen rows of w from `row` on, inner numbers k0 to k0+k-1, as a panel; rows past the last are zero.
//
//   ┌───────────── k ─┐                ┌ 16 ┐
//   │ w[row]  ....... │   transposed   │ k0 │
//   │  ...            │  ────────────▶ │ k1 │
//   │ w[row+15]  .... │                │ .. │
//   └─────────────────┘                └────┘
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

// Where a panel lies in w: rows from `row` on, inner numbers from k0 on.
struct Place {
  int64_t row;
  int k0, k;
};

// Weights as they lie in the checkpoint, `rows` of k_all numbers, fp32 or bf16.
template <class W>
struct Lying {
  const W* w;
  int64_t stride, rows;
  int k_all;

  void fill(const Place& at, float* to) const { fill_panel(w, stride, at.row, rows, at.k0, at.k, to); }

  // One of `of` parts of a panel, into the cache: rows are too many streams for the processor to foresee.
  void fetch(const Place& at, int64_t part, int64_t of) const {
    constexpr int LINE = 64 / sizeof(W);
    const int64_t lines = divide_up(at.k, LINE);
    const W* from = w + at.row * stride + at.k0;
    for (int64_t i = LANES * lines * part / of; i < LANES * lines * (part + 1) / of; i++)
      prefetch(from + i / lines * stride + i % lines * LINE);
  }

  // The sums of a piece of M rows by one panel in one pass over the weights, which are turned in registers. Meanwhile the
  // sixteen rows from `next` on come into the cache, in the order in which they lie: rows are too many streams for the
  // processor to foresee, and memory likes to be read along.
  template <int M>
  void stream(const float* const* a, int64_t row, int64_t next, float* sum, int64_t sum_stride) const {
    constexpr int LINE = 64 / sizeof(W);
    const W *from = w + row * stride, *ahead = w + next * stride;
    const int whole = k_all / LANES * LANES;
    const int64_t step = stride == k_all ? LINE : stride, along = stride == k_all ? LANES : 1;
    V16 c[M];
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = all(0.0f);
    for (int i = 0; i < whole; i += LANES) {
      if (i % LINE == 0)
        for (int j = 0; j < LANES; j++) prefetch(ahead + j * step + i * along);
      add_rows16<M>(from, stride, a, i, c);
    }
    for (int i = whole; i < k_all; i++) {
      alignas(64) float column[LANES];
      for (int j = 0; j < LANES; j++) {
        if constexpr (sizeof(W) == 2) column[j] = widen(from[j * stride + i]);
        else column[j] = from[j * stride + i];
      }
      TF_UNROLL for (int m = 0; m < M; m++) c[m] = fma(all(a[m][i]), load(column), c[m]);
    }
    TF_UNROLL for (int m = 0; m < M; m++) store(sum + m * sum_stride, c[m]);
  }
};

template <class W>
Lying<W> lying(const void* w, int64_t stride, int64_t rows, int k_all) {
  return {static_cast<const W*>(w), stride, rows, k_all};
}

// Whether a piece of few rows was done without panels: only weights as they lie are, and where all sixteen rows are there.
template <class L, class Weights>
bool streamed(const L&, const Piece&, const Weights&, float*) {
  return false;
}

template <class L, class W>
bool streamed(const L& it, const Piece& piece, const Lying<W>& weights, float* sum) {
  if (piece.m > FEW) return false;
  const float* a[FEW];
  for (int m = 0; m < piece.m; m++) a[m] = it.a + piece.row(m) * it.a_stride;
  for (int p = 0; p < piece.panels; p++)
    if (piece.column[p] + LANES > weights.rows) return false;
  const int64_t sum_stride = int64_t(piece.panels) * LANES;
  for (int p = 0; p < piece.panels; p++) {
    float* to = sum + p * LANES;
    const int64_t row = piece.column[p], next = p + 1 < piece.panels ? piece.column[p + 1] : piece.following;
    if (piece.m == 1) weights.template stream<1>(a, row, next, to, sum_stride);
    else if (piece.m == 2) weights.template stream<2>(a, row, next, to, sum_stride);
    else weights.template stream<3>(a, row, next, to, sum_stride);
  }
  return true;
}

// The panel after number p of a slab: the next of this slab, the first of the next one, or the next piece's.
inline Place after(const Piece& piece, int p, const Place& now, int most, int k_all) {
  if (p + 1 < piece.panels) return {piece.column[p + 1], now.k0, now.k};
  const int k0 = now.k0 + now.k < k_all ? now.k0 + now.k : 0;
  return {k0 ? piece.column[0] : piece.following, k0, std::min(most, k_all - k0)};
}

// Rows of activations as they lie, [rows][k].
struct Rows {
  const float* a;
  int64_t stride;

  const float* at(const Piece& piece, int m, int k0) const { return a + piece.row(m) * stride + k0; }
  bool copied(const Piece& piece) const { return piece.m > FEW || (piece.from && piece.m > 1); }
  void copy(const Piece& piece, int k0, int k, float* slab) const {
    for (int m = 0; m < piece.m; m++) std::memcpy(slab + m * WIDTH, at(piece, m, k0), sizeof(float) * k);
  }
};

// The sums of a piece, slab after slab; a panel of the weights is multiplied while it is in the first-level cache. `later`:
// how a slab that is not the first begins.
template <class R, class Weights>
void sums_of(const R& rows, int k_all, const Piece& piece, const Weights& weights, float* slab, float* panel, float* sum,
             Begin later = Begin::onward) {
  const int most = piece.m <= FEW ? FEW_SLAB : SLAB;
  const int64_t sum_stride = int64_t(piece.panels) * LANES, panel_stride = int64_t(most) * LANES;
  int k0 = 0;
  do {
    const int k = std::min(most, k_all - k0);
    const bool copied = rows.copied(piece);
    if (copied) rows.copy(piece, k0, k, slab);
    const float* a = copied ? slab : rows.at(piece, 0, k0);
    const int64_t a_stride = copied ? WIDTH : rows.stride;
    for (int p = 0, some; p < piece.panels; p += some) {
      some = side_by_side(piece.m, piece.panels - p);
      Place at{};
      for (int j = 0; j < some; j++) weights.fill(at = {piece.column[p + j], k0, k}, panel + j * panel_stride);
      const Place next = after(piece, p + some - 1, at, most, k_all);
      multiply(a, a_stride, piece.m, panel, panel_stride, some, k, sum + p * LANES, sum_stride,
               k0 ? later : Begin::fresh,
               [&](int64_t part, int64_t of) { weights.fetch(next, part, of); });
    }
    k0 += most;
  } while (k0 < k_all);
}

// Bias, activation, gate; then the sums are outputs: put(row of the piece, output, count, sixteen of them).
template <class L, class Put>
void finish(const L& it, const Piece& piece, int outputs, const float* sum, Put put) {
  const int64_t sum_stride = int64_t(piece.panels) * LANES;
  const Act act = Act(it.act);
  for (int m = 0; m < piece.m; m++)
    for (int p = 0; p < outputs; p++) {
      const int64_t n = piece.column[p];
      const int count = int(std::min<int64_t>(LANES, it.n - n));
      V16 x = load(sum + m * sum_stride + p * LANES);
      if (it.bias) x = x + it.bias.load16(n, count);
      x = activation(x, act);
      if (it.gated) {
        V16 up = load(sum + m * sum_stride + (outputs + p) * LANES);
        if (it.bias) up = up + it.bias.load16(it.n + n, count);
        x = x * up;
      }
      put(m, n, count, x);
    }
}

template <class L>
void finish(const L& it, const Piece& piece, int outputs, const float* sum) {
  finish(it, piece, outputs, sum, [&](int m, int64_t n, int count, V16 x) {
    store(it.out + (piece.m0 + m) * it.out_stride + n, x, count);
  });
}

// The sums of a piece by the way that suits its weights.
template <class L, class Weights>
void sums_of(const L& it, const Piece& piece, const Weights& weights, float* slab, float* panel, float* sum) {
  if (!streamed(it, piece, weights, sum)) sums_of(Rows{it.a, it.a_stride}, it.k, piece, weights, slab, panel, sum);
}

// A product shared out: rows in blocks, outputs in runs of panels, so that there is work for every thread and a block's slab
// stays in cache. sums(piece, slab, panel, sum), then put(piece, outputs, sum).
template <class Sums, class Put>
void share_out(int64_t rows, int n, bool gated, Crew& crew, Sums sums, Put put) {
  const int64_t panels = divide_up(n, LANES), blocks = divide_up(rows, ROWS);
  if (!rows) return;
  // Panels of a piece: as many as the rows make worth while, but enough pieces for every thread.
  int64_t each = (rows <= FEW ? PANELS / 4 : PANELS) / (gated ? 2 : 1);
  while (each > 1 && blocks * divide_up(panels, each) < 4 * crew.threads) each /= 2;
  if (rows <= FEW && each < 4 && panels >= 4 * crew.threads) each = gated ? 2 : 4;
  const int64_t per_block = divide_up(panels, each), pieces = blocks * per_block;
  const int64_t most_rows = std::min<int64_t>(rows, ROWS + TILE), sources = gated ? 2 * each : each;
  float* panel = nullptr;
  for (int64_t i; (i = crew.take()) < pieces;) {
    if (!panel) panel = crew.scratch->need<float>(FOUR * SLAB * LANES + most_rows * (WIDTH + sources * LANES));
    float *slab = panel + FOUR * SLAB * LANES, *sum = slab + most_rows * WIDTH;
    const int64_t block = i / per_block, p0 = (i % per_block) * each;
    const int outputs = int(std::min(each, panels - p0));
    int64_t column[PANELS];
    for (int p = 0; p < outputs; p++) column[p] = (p0 + p) * LANES;
    for (int p = 0; gated && p < outputs; p++) column[outputs + p] = n + (p0 + p) * LANES;
    // Rows are shared out evenly, so that no piece is a remainder of a few, and by whole tiles.
    const int64_t m0 = rows * block / blocks / TILE * TILE;
    const int64_t m1 = block + 1 == blocks ? rows : rows * (block + 1) / blocks / TILE * TILE;
    const int64_t following = std::min(column[0] + crew.threads * each * LANES, int64_t(n) - 1);
    const Piece piece{m0, int(m1 - m0), gated ? 2 * outputs : outputs, column, nullptr, following};
    sums(piece, slab, panel, sum);
    put(piece, outputs, sum);
  }
}

template <class L, class Weights>
void multiply_by_panels(const L& it, Crew& crew, const Weights& weights) {
  share_out(
      *it.rows, it.n, it.gated, crew,
      [&](const Piece& piece, float* slab, float* panel, float* sum) { sums_of(it, piece, weights, slab, panel, sum); },
      [&](const Piece& piece, int outputs, const float* sum) { finish(it, piece, outputs, sum); });
}

}  // namespace
