// How work on rows is cut into pieces: whole rows where they are many, parts of them where they are long.
#pragma once
#include <algorithm>

#include "crew.h"
#include "simd.h"

constexpr int64_t AT_ONCE = 4096;  // numbers of one piece of work, about

// Pieces of whole rows: f(first, last).
template <class F>
void by_rows(Crew& crew, int64_t rows, int64_t width, F f) {
  const int64_t each = std::max<int64_t>(1, std::min(AT_ONCE / std::max<int64_t>(1, width), divide_up(rows, crew.threads)));
  for (int64_t i; (i = crew.take() * each) < rows;) f(i, std::min(rows, i + each));
}

// Pieces of a row too, for rows that are few and long: f(row, from, to).
template <class F>
void by_parts(Crew& crew, int64_t rows, int64_t width, F f) {
  const int64_t parts = divide_up(width, AT_ONCE);
  for (int64_t i; (i = crew.take()) < rows * parts;)
    f(i / parts, (i % parts) * AT_ONCE, std::min(width, (i % parts + 1) * AT_ONCE));
}

template <class F>
inline void by_lanes(int64_t from, int64_t to, F f) {
  for (int64_t i = from; i < to; i += LANES) f(i, int(std::min<int64_t>(LANES, to - i)));
}
