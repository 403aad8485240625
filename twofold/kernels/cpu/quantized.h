// What products with weights in panels are made of, for one piece of work: `quantized.cpp`.
#pragma once
#include "tiles.h"

// sum[m][p][16] of the piece's rows of x, one after another (no `from`), by its panels.
void sums_of_rounded(const Rounded& x, const Panels& w, const Piece& piece, float* sum);

// Rows of a piece.
int64_t rows_of_block(const Rounded& x);

// Inputs k0 to k0+k-1 of a panel, widened: scale * (code - zero).
void widen_panel(const Panels& w, int64_t panel, int k0, int k, float* to);

// Panels as `sums_of` takes weights. They ask for their codes themselves, line after line.
struct Widened {
  const Panels& panels;

  void fill(const Place& at, float* to) const { widen_panel(panels, at.row / LANES, at.k0, at.k, to); }
  void fetch(const Place&, int64_t, int64_t) const {}
};
