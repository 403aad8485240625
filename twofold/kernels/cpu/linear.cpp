// A product with weights as they lie in the checkpoint, [n, k] row by row, in fp32 or bf16: `tiles.h` has the picture.
#include "tiles.h"

void run(const Linear& it, Crew& crew) {
  const int64_t rows = *it.rows, panels = divide_up(it.n, LANES), blocks = divide_up(rows, ROWS);
  if (!rows) return;
  // Panels of a piece: as many as the rows make worth while, but enough pieces for every thread.
  int64_t each = it.gated ? 4 : 8;
  while (each > 1 && blocks * divide_up(panels, each) < 4 * crew.threads) each /= 2;
  if (rows <= 3 && each < 4 && panels >= 4 * crew.threads) each = it.gated ? 2 : 4;
  const int64_t per_block = divide_up(panels, each), pieces = blocks * per_block;
  const int64_t rows_of_w = it.gated ? 2 * int64_t(it.n) : it.n;
  for (int64_t i; (i = crew.take()) < pieces;) {
    const int64_t block = i / per_block, p0 = (i % per_block) * each;
    // Rows are shared out evenly, so that no piece is a remainder of a few.
    const int64_t m0 = rows * block / blocks, m1 = rows * (block + 1) / blocks;
    const Rows left{it.a + m0 * it.a_stride, it.a_stride, nullptr, int(m1 - m0)};
    const Panels right = panels_of(p0, int(std::min(each, panels - p0)), it.n, it.gated);
    Room room(*crew.scratch, std::min<int64_t>(rows, ROWS), it.gated ? 2 * each : each);
    sum_up(left, right, it.k, room, it.w, it.type, it.w_stride, rows_of_w);
    finish(left, right, room.sum, it.n, Act(it.act), it.gated, it.bias, [&](int m, int64_t n, int count, V16 x) {
      store(it.out + (m0 + m) * it.out_stride + n, x, count);
    });
  }
}
