// Products with weights as they lie in the checkpoint, [n, k] row by row, in fp32 or bf16: `tiles.h`.
#include "tiles.h"

void run(const Linear& it, Crew& crew) {
  const int64_t rows = it.gated ? 2 * int64_t(it.n) : it.n;
  if (it.type == Type::bf16) multiply_by_panels(it, crew, lying<uint16_t>(it.w, it.w_stride, rows, it.k));
  else multiply_by_panels(it, crew, lying<float>(it.w, it.w_stride, rows, it.k));
}

TF_STAGE(Linear)
