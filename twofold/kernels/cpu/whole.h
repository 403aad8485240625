// I16: sixteen 32-bit whole numbers, and sums of products of bytes over one group of inputs, for a tile of rows by the
// sixteen outputs of a panel. Sums are exact, so how an instruction set comes to them is its own business:
//
//   one step, 64 bytes      int8: 4 inputs    [16 outputs][4 bytes]
//                           int4: 8 inputs    [16 outputs][4 bytes], inputs 0-3 in the low halves, 4-7 in the high ones
//
//   whole_sums<BITS, M>     c[m] = sum over the group of a[m][i] * (code[i] + LIFT<BITS>)
//
// LIFT makes signed codes unsigned where the instruction wants that; the caller takes LIFT * sum(a) off again.
#pragma once
#include "simd.h"

constexpr int AHEAD = 4096;  // bytes: how far in front codes are asked for; where rows are few, memory is the limit

#if defined(__AVX512F__)
#include "whole_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "whole_avx2.h"
#else
#include "whole_portable.h"
#endif
