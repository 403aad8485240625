"""Activations as int8 codes, and rows of a quantized table.

Shapes: T tokens, K inputs, G groups of k inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import LANES, SMALLEST, Packed, plain
from ..quantized import quantized_rows as rows_by_widening

_AT_ONCE = 4096


@triton.jit
def nearest(v):
    """fp32 numbers below 2^22 rounded to whole ones, ties to even: 1.5 · 2^23 leaves no bits after the point."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _quantize(x, codes, scales, x_row, T, K, G, k, SMALLEST: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """PIECES groups of rows, each by itself."""
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    row = (piece // G).to(tl.int64)[:, None]
    begin = (piece % G * k)[:, None]
    real = piece < T * G
    top = tl.zeros((PIECES,), tl.float32)
    for start in range(0, k, BLOCK):
        inside = start + tl.arange(0, BLOCK)[None, :]
        live = real[:, None] & (inside < k) & (begin + inside < K)
        v = tl.load(x + row * x_row + begin + inside, live, 0.0).to(tl.float32)
        v = tl.where(v == v, tl.abs(v), float("inf"))  # a maximum may lose a NaN
        top = tl.maximum(top, tl.max(v, 1))
    finite = top < float("inf")
    some = (top > SMALLEST) & finite
    inverse = tl.where(some, tl.div_rn(127.0, tl.where(some, top, 1.0)), 0.0)
    for start in range(0, k, BLOCK):
        inside = start + tl.arange(0, BLOCK)[None, :]
        live = real[:, None] & (inside < k) & (begin + inside < K)
        v = tl.load(x + row * x_row + begin + inside, live, 0.0).to(tl.float32)
        v = nearest(tl.where(some[:, None], v, 0.0) * inverse[:, None])
        tl.store(codes + row * K + begin + inside, v.to(tl.int8), live)
    scale = tl.where(some, tl.div_rn(top, 127.0), 0.0)
    tl.store(scales + piece, tl.where(finite, scale, float("nan")), real)


@triton.jit
def _table(ids, codes, scales, zeros, out, K, G, k, panel, BITS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < K
    row = tl.load(ids + token)
    base = codes + (row // 16) * panel + row % 16 * 4
    if BITS == 8:
        code = tl.load(base + at // 4 * 64 + at % 4, live, 0).to(tl.float32)
        zero = 0.0
    else:
        byte = tl.load(base + at // 8 * 64 + at % 4, live, 0)
        code = tl.where(at % 8 < 4, byte & 15, byte >> 4).to(tl.float32)
        zero = 8.0
    place = (row // 16) * G * 16 + at // k * 16 + row % 16
    if zeros is not None:
        code = code - tl.load(zeros + place, live, 0).to(tl.float32)
    else:
        code = code - zero
    tl.store(out + token * K + at, code * tl.load(scales + place, live, 0.0).to(tl.float32), live)


def quantize_rows(x_TK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`kernels.quantized.quantize_rows` on CUDA."""
    T, K = x_TK.shape
    k = group or K
    groups = -(-K // k) if K else 1
    codes_TK = torch.empty(T, K, dtype=torch.int8, device=x_TK.device)
    scale_TG = torch.empty(T, groups, dtype=torch.float32, device=x_TK.device)
    if codes_TK.numel():
        x_TK = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
        block = min(_AT_ONCE, triton.next_power_of_2(k))
        pieces = _AT_ONCE // block
        _quantize[(triton.cdiv(T * groups, pieces),)](
            x_TK,
            codes_TK,
            scale_TG,
            x_TK.stride(0),
            T,
            K,
            groups,
            k,
            SMALLEST=SMALLEST,
            PIECES=pieces,
            BLOCK=block,
            num_warps=4,
        )
    return codes_TK, scale_TG


def quantized_rows(ids_T: Tensor, w: Packed) -> Tensor:
    """`kernels.quantized.quantized_rows` on CUDA: rows of a table in panels, fp32."""
    if not plain(w):
        return rows_by_widening.reference(ids_T, w)
    assert LANES == 16, "the kernel has the width of a panel built in"
    out_TK = torch.empty(len(ids_T), w.k, dtype=torch.float32, device=w.codes.device)
    if out_TK.numel():
        _table[(len(ids_T), triton.cdiv(w.k, 1024))](
            ids_T,
            w.codes.contiguous(),
            w.scales.contiguous(),
            None if w.zeros is None else w.zeros.contiguous(),
            out_TK,
            w.k,
            w.scales.shape[-2],
            w.group or w.k,
            w.codes[0].numel(),
            BITS=w.bits,
            BLOCK=1024,
            num_warps=4,
        )
    return out_TK
