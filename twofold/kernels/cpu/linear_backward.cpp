// The two products of a linear layer's backward, by the tiles of its forward.
//
//   dx[t, k] = sum over n of dy[t, n] * w[n, k]     a lies:    rows of dy
//   dw[n, k] = sum over t of dy[t, n] * x[t, k]     a stands:  columns of dy, turned when they are copied
//
// In both the second factor lies as a panel wants it, sixteen outputs side by side. Each output is the sum of its slabs' sums, in
// order: the same bits with any number of threads, and less lost than in one long chain.
#include "tiles.h"

// out[m, n] (+)= sum over k of A[m, k] * b[k, n], where A is a[m][k], or a[k][m] where it stands.
struct Slopes {
  const int32_t* rows;
  int32_t n, k;
  Type type;  // of b: fp32 or bf16
  int32_t standing, add, unused;
  const void* b;
  int64_t b_stride;
  const float* a;
  int64_t a_stride;
  float* out;
  int64_t out_stride;
};

namespace {

// The second factor, [k][n]: a panel is sixteen of its columns.
template <class W>
struct Columns {
  const W* b;
  int64_t stride;
  int n;

  void fill(const Place& at, float* to) const {
    const W* from = b + at.k0 * stride + at.row;
    const int count = int(std::min<int64_t>(LANES, n - at.row));
    for (int i = 0; i < at.k; i++, from += stride) store(to + i * LANES, load_any(from, count));
  }
  void fetch(const Place& at, int64_t part, int64_t of) const {
    for (int64_t i = at.k * part / of; i < at.k * (part + 1) / of; i++) prefetch(b + (at.k0 + i) * stride + at.row);
  }
  static V16 load_any(const float* from, int count) { return load(from, count); }
  static V16 load_any(const uint16_t* from, int count) { return load_bf16(from, count); }
};

// Rows that stand, [k][rows]: sixteen by sixteen they are turned.
struct Standing {
  const float* a;
  int64_t stride;

  const float* at(const Piece&, int, int) const { return nullptr; }
  bool copied(const Piece&) const { return true; }
  void copy(const Piece& piece, int k0, int k, float* slab) const {
    const float* from = a + k0 * stride + piece.m0;
    alignas(64) float turned[LANES * LANES];
    const int m_whole = piece.m / LANES * LANES, k_whole = k / LANES * LANES;
    for (int i = 0; i < k_whole; i += LANES)
      for (int m = 0; m < m_whole; m += LANES) {
        transpose16(from + i * stride + m, stride, turned);
        for (int j = 0; j < LANES; j++) store(slab + (m + j) * WIDTH + i, load(turned + j * LANES));
      }
    for (int i = 0; i < k; i++)
      for (int m = i < k_whole ? m_whole : 0; m < piece.m; m++) slab[m * WIDTH + i] = from[i * stride + m];
  }
};

template <class A, class W>
void multiply(const Slopes& it, const A& rows, const W* b, Crew& crew) {
  const Columns<W> columns{b, it.b_stride, it.n};
  share_out(
      *it.rows, it.n, false, crew,
      [&](const Piece& piece, float* slab, float* panel, float* sum) {
        sums_of(rows, it.k, piece, columns, slab, panel, sum, Begin::apart);
      },
      [&](const Piece& piece, int outputs, const float* sum) {
        for (int m = 0; m < piece.m; m++)
          for (int p = 0; p < outputs; p++) {
            const int64_t n = piece.column[p];
            const int count = int(std::min<int64_t>(LANES, it.n - n));
            float* out = it.out + (piece.m0 + m) * it.out_stride + n;
            const V16 x = load(sum + (int64_t(m) * outputs + p) * LANES);
            store(out, it.add ? load(out, count) + x : x, count);
          }
      });
}

template <class A>
void multiply(const Slopes& it, const A& rows, Crew& crew) {
  if (it.type == Type::bf16) multiply(it, rows, static_cast<const uint16_t*>(it.b), crew);
  else multiply(it, rows, static_cast<const float*>(it.b), crew);
}

}  // namespace

void run(const Slopes& it, Crew& crew) {
  if (it.standing) multiply(it, Standing{it.a, it.a_stride}, crew);
  else multiply(it, Rows{it.a, it.a_stride}, crew);
}

TF_STAGE(Slopes)
