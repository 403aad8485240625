// Rows in groups, each group by its own matrix: the experts of a mixture (as MegaBlocks has them, Gale et al. 2022) and
// the adapters of a batch (SGMV: Punica, Chen et al. 2023; S-LoRA, Sheng et al. 2023). Matrices may differ in size.
//
//   places   0 0 0 0 0 | 2 2 | 3        pieces, in one list that every thread walks: a group's rows in blocks,
//            └ group 0 ┘                by some panels of its matrix; a thread does those that it takes
//
// A place's bits are those of its row by that matrix alone: `tiles.h`.
#include "quantized.h"

namespace {

// A product as `tiles.h` reads it: one group's.
struct Product {
  int n, k, act, gated;
  Numbers bias;
  const float* a;
  int64_t a_stride;
};

// Rounded rows of a piece one after another, in `room`.
Rounded gather(const Rounded& x, const Piece& piece, int8_t* room) {
  Rounded to = x;
  to.codes = room;
  to.scales = reinterpret_cast<float*>(room + divide_up(int64_t(piece.m) * x.stride, 64) * 64);
  to.sums = reinterpret_cast<int32_t*>(to.scales + int64_t(piece.m) * x.groups);
  for (int m = 0; m < piece.m; m++) {
    const int64_t row = piece.row(m);
    std::memcpy(to.codes + int64_t(m) * x.stride, x.codes + row * x.stride, x.stride);
    std::copy_n(x.scales + row * x.groups, x.groups, to.scales + int64_t(m) * x.groups);
    std::copy_n(x.sums + row * x.groups, x.groups, to.sums + int64_t(m) * x.groups);
  }
  return to;
}

// room: sums, then what a piece of this kind needs.
float* sums_of_piece(const Grouped& it, const Matrix& matrix, const Product& product, const Piece& piece, Scratch& scratch) {
  const int64_t sums = int64_t(piece.m) * piece.panels * LANES;
  if (!matrix.w && !it.a) {
    const int64_t copied = piece.from ? int64_t(piece.m) * (it.rounded.stride + 8 * it.rounded.groups) + 64 : 0;
    float* sum = scratch.need<float>(sums + divide_up(copied, sizeof(float)));
    if (!piece.from) return sums_of_rounded(it.rounded, matrix.panels, piece, sum), sum;
    Piece here = piece;
    here.m0 = 0, here.from = nullptr;
    sums_of_rounded(gather(it.rounded, piece, reinterpret_cast<int8_t*>(sum + sums)), matrix.panels, here, sum);
    return sum;
  }
  float* sum = scratch.need<float>(sums + int64_t(piece.m) * WIDTH + FOUR * SLAB * LANES);
  float *slab = sum + sums, *panel = slab + int64_t(piece.m) * WIDTH;
  const int64_t rows = product.gated ? 2 * int64_t(product.n) : product.n;
  if (!matrix.w)
    sums_of(product, piece, Widened{matrix.panels}, slab, panel, sum);
  else if (matrix.type == Type::bf16)
    sums_of(product, piece, lying<uint16_t>(matrix.w, matrix.stride, rows, product.k), slab, panel, sum);
  else
    sums_of(product, piece, lying<float>(matrix.w, matrix.stride, rows, product.k), slab, panel, sum);
  return sum;
}

int64_t most_rows(const Grouped& it) { return it.a ? ROWS : rows_of_block(it.rounded); }

// out += scale * (a . w) where the inner numbers are few, as an adapter's ranks are: sums stay in registers until they are
// added, since otherwise more time goes into keeping them than into making them. The chains of additions are those of `tile`.
template <int M>
void add_tile(const float* const* a, const float* panel, int k, float scale, float* const* out, int count) {
  V16 c[M];
  TF_UNROLL for (int m = 0; m < M; m++) c[m] = all(0.0f);
  for (int i = 0; i < k; i++) {
    const V16 w = load(panel + i * LANES);
    TF_UNROLL for (int m = 0; m < M; m++) c[m] = fma(all(a[m][i]), w, c[m]);
  }
  TF_UNROLL for (int m = 0; m < M; m++) store(out[m], load(out[m], count) + all(scale) * c[m], count);
}

template <class W>
void add_piece(const Grouped& it, const Matrix& matrix, const Product& product, const Piece& piece, Scratch& scratch) {
  float* panel = scratch.need<float>(SLAB * LANES);
  for (int p = 0; p < piece.panels; p++) {
    const int64_t n = piece.column[p];
    fill_panel(static_cast<const W*>(matrix.w), matrix.stride, n, product.n, 0, product.k, panel);
    const int count = int(std::min<int64_t>(LANES, product.n - n));
    for (int m = 0, some; m < piece.m; m += some) {
      const float* a[4];
      float* out[4];
      some = std::min(4, piece.m - m);
      for (int j = 0; j < some; j++) {
        const int64_t place = piece.m0 + m + j;
        a[j] = product.a + piece.row(m + j) * product.a_stride;
        out[j] = it.out + (it.to ? it.to[place] : place) * it.out_stride + matrix.out_at + n;
      }
      if (some == 4) add_tile<4>(a, panel, product.k, matrix.scale, out, count);
      else for (int j = 0; j < some; j++) add_tile<1>(a + j, panel, product.k, matrix.scale, out + j, count);
    }
  }
}

// One piece of a group: some panels of one of its matrices by some of its rows.
void do_piece(const Grouped& it, int which, int64_t number, int64_t each, Crew& crew) {
  const Matrix& matrix = it.matrices[which];
  const int group = which / it.parts;
  const int64_t begin = it.first[group], rows = it.first[group + 1] - begin, blocks = divide_up(rows, most_rows(it));
  const int64_t panels = divide_up(matrix.n, LANES), per_block = divide_up(panels, each);
  const int64_t block = number / per_block, p0 = (number % per_block) * each;
  const int64_t m0 = begin + rows * block / blocks, m1 = begin + rows * (block + 1) / blocks;
  const int outputs = int(std::min(each, panels - p0));
  int64_t column[16];
  for (int p = 0; p < outputs; p++) column[p] = (p0 + p) * LANES, column[outputs + p] = matrix.n + (p0 + p) * LANES;
  const Piece piece{m0, int(m1 - m0), it.gated ? 2 * outputs : outputs, column, it.from, column[0] + outputs * LANES};
  const Product product{matrix.n, matrix.k, it.act, it.gated, Numbers{}, it.a + matrix.a_at, it.a_stride};
  if (it.add && it.a && matrix.w && !it.gated && Act(it.act) == Act::none && matrix.k <= SLAB && piece.m > FEW) {
    if (matrix.type == Type::bf16) add_piece<uint16_t>(it, matrix, product, piece, *crew.scratch);
    else add_piece<float>(it, matrix, product, piece, *crew.scratch);
    return;
  }
  const float* sum = sums_of_piece(it, matrix, product, piece, *crew.scratch);
  finish(product, piece, outputs, sum, [&](int m, int64_t n, int count, V16 x) {
    float* out = it.out + (it.to ? it.to[m0 + m] : m0 + m) * it.out_stride + matrix.out_at + n;
    store(out, it.add ? load(out, count) + all(matrix.scale) * x : x, count);
  });
}

}  // namespace

void run(const Grouped& it, Crew& crew) {
  const int matrices = it.groups * it.parts;
  const auto pieces_of = [&](int which, int64_t each) {
    const int64_t rows = it.first[which / it.parts + 1] - it.first[which / it.parts];
    return divide_up(rows, most_rows(it)) * divide_up(divide_up(it.matrices[which].n, LANES), each);
  };
  // Panels of a piece: as many as leave enough pieces for every thread.
  int64_t each = it.gated ? 4 : 8;
  for (; each > 1; each /= 2) {
    int64_t pieces = 0;
    for (int i = 0; i < matrices; i++) pieces += pieces_of(i, each);
    if (pieces >= 4 * crew.threads) break;
  }
  int64_t mine = crew.take();
  for (int64_t i = 0, before = 0; i < matrices; i++) {
    const int64_t after = before + pieces_of(int(i), each);
    for (; mine < after; mine = crew.take()) do_piece(it, int(i), mine - before, each, crew);
    before = after;
  }
}

TF_STAGE(Grouped)
