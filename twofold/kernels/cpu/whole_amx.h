// Whole numbers with AMX: sums of at most sixteen rows by sixteen outputs by 64 inputs in one instruction. An int8 panel lies
// as the instruction wants it; int4 codes are spread out to bytes first.
//
//   tile 1: a [rows][inputs]     tile 2: codes [inputs/4][16 outputs][4]     tile 0: sums [rows][16], 32 bits
//
// This was compiled, and run with the instructions acted out in C++, but never on a processor that has them.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr int AMX_ROWS = 16, AMX_INPUTS = 64;
constexpr int AMX_FROM = 8;  // rows; fewer wait for memory either way

// Linux keeps the tiles from a process that has not asked for them.
static inline bool amx_granted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// How many rows and inputs the tiles are for; to say so empties them.
struct AmxShape {
  int rows = 0, inputs = 0;

  void be(int new_rows, int new_inputs) {
    if (rows == new_rows && inputs == new_inputs) return;
    rows = new_rows, inputs = new_inputs;
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } all = {1, 0, {}, {64, uint16_t(inputs), 64}, {uint8_t(rows), uint8_t(rows), uint8_t(inputs / 4)}};
    static_assert(sizeof all == 64);
    _tile_loadconfig(&all);
  }
};

// c[m][n] = sum of a[m][i] * codes[i][n] over the inputs of a group.
static inline void amx_sums(AmxShape& shape, int32_t* c, const int8_t* a, int64_t stride, const uint8_t* codes, int rows,
                            int inputs) {
  for (int i = 0; i < inputs;) {
    const int width = std::min(AMX_INPUTS, inputs - i), end = inputs - (inputs - i) % width;
    shape.be(rows, width);
    if (i) _tile_loadd(0, c, 64);
    else _tile_zero(0);
    for (; i < end; i += width) {
      _tile_loadd(1, a + i, stride);
      _tile_loadd(2, codes + int64_t(i) * 16, 64);
      _tile_dpbssd(0, 1, 2);
    }
    _tile_stored(0, c, 64);
  }
}

// An int4 panel as an int8 one: eight inputs' 64 bytes become twice four inputs'.
static inline void spread_nibbles(const uint8_t* from, int inputs, uint8_t* to) {
  for (int i = 0; i < inputs; i += 8, from += 64, to += 128)
    for (int j = 0; j < 64; j++) to[j] = from[j] & 15, to[64 + j] = from[j] >> 4;
}
