// Sixteen rows of sixteen numbers brought down to one number each, all rows at once.
#pragma once
#include "simd.h"

struct Square {
  alignas(64) float row[LANES][LANES];
};

// f over each row's numbers, in their order; lanes of the result are rows.
template <class F>
inline V16 across(const Square& square, F f) {
  alignas(64) float columns[LANES * LANES];
  transpose16(square.row[0], LANES, columns);
  V16 found = load(columns);
  for (int i = 1; i < LANES; i++) found = f(found, load(columns + i * LANES));
  return found;
}
inline V16 largest_across(const Square& square) {
  return across(square, [](V16 a, V16 b) { return max(a, b); });
}
inline V16 total_across(const Square& square) {
  return across(square, [](V16 a, V16 b) { return a + b; });
}
