// What products with weights in panels are made of, for one piece of work: `quantized.cpp`.
#pragma once
#include "tiles.h"

// sum[m][p][16] of the piece's rows of x, one after another (no `from`), by its panels.
void sums_of_rounded(const Rounded& x, const Panels& w, const Piece& piece, float* sum);

// Rows of a piece.
int64_t rows_of_block(const Rounded& x);

// Inputs k0 to k0+k-1 of a panel, widened: scale * (code - zero).
void widen_panel(const Panels& w, int64_t panel, int k0, int k, float* to);
