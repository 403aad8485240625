// Rows in groups, each group by its own matrix: the experts of a mixture (as MegaBlocks has them, Gale et al. 2022) and
// the adapters of a batch (SGMV: Punica, Chen et al. 2023; S-LoRA, Sheng et al. 2023). Matrices may differ in size.
//
//   places   0 0 0 0 0 | 2 2 | 3        pieces, in one list that every thread walks: a group's rows in blocks,
//            └ group 0 ┘                by some panels of its matrix; a thread does those that it takes
//
// A place's bits are those of its row by that matrix alone: `tiles.h`.
#include "tiles.h"

namespace {

// One piece of a group: some panels of its matrix by some of its rows.
void do_piece(const Grouped& it, int group, int64_t piece, int64_t each, Crew& crew) {
  const Matrix& matrix = it.matrices[group];
  const int64_t begin = it.first[group], rows = it.first[group + 1] - begin, blocks = divide_up(rows, ROWS);
  const int64_t panels = divide_up(matrix.n, LANES), per_block = divide_up(panels, each);
  const int64_t block = piece / per_block, p0 = (piece % per_block) * each;
  const int64_t m0 = begin + rows * block / blocks, m1 = begin + rows * (block + 1) / blocks;
  const Rows left{it.from ? it.a : it.a + m0 * it.a_stride, it.a_stride, it.from ? it.from + m0 : nullptr, int(m1 - m0)};
  const Panels right = panels_of(p0, int(std::min(each, panels - p0)), matrix.n, it.gated);
  Room room(*crew.scratch, left.count, right.count);
  sum_up(left, right, matrix.k, room, matrix.w, matrix.type, matrix.stride, it.gated ? 2 * int64_t(matrix.n) : matrix.n);
  finish(left, right, room.sum, matrix.n, Act(it.act), it.gated, Numbers{}, [&](int m, int64_t n, int count, V16 x) {
    float* out = it.out + (it.to ? it.to[m0 + m] : m0 + m) * it.out_stride + n;
    store(out, it.add ? load(out, count) + all(matrix.scale) * x : x, count);
  });
}

}  // namespace

void run(const Grouped& it, Crew& crew) {
  const auto pieces_of = [&](int group, int64_t each) {
    const int64_t rows = it.first[group + 1] - it.first[group];
    return divide_up(rows, ROWS) * divide_up(divide_up(it.matrices[group].n, LANES), each);
  };
  // Panels of a piece: as many as leave enough pieces for every thread.
  int64_t each = it.gated ? MOST_PANELS / 4 : MOST_PANELS / 2;
  for (; each > 1; each /= 2) {
    int64_t pieces = 0;
    for (int g = 0; g < it.groups; g++) pieces += pieces_of(g, each);
    if (pieces >= 4 * crew.threads) break;
  }
  int64_t mine = crew.take();
  for (int64_t g = 0, before = 0; g < it.groups; g++) {
    const int64_t after = before + pieces_of(g, each);
    for (; mine < after; mine = crew.take()) do_piece(it, g, mine - before, each, crew);
    before = after;
  }
}
