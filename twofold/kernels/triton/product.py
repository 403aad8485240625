"""The matrix product that every linear layer and every expert runs in: y = x Wᵀ, one order of additions.

A program makes a tile of ROWS x COLUMNS and walks over all inputs, INNER at a time, adding into one fp32 number for
each output. Nothing is split over the inputs, so nothing is added up in an order that a scheduler chose.

    form     weights                            one step of the walk adds
    plain    [N, K], any float type             x · w
    int8     panels of `kernels/quantized.py`   scale · (x · (code - zero))
    int4     the same, the low halves of the bytes first, then the high ones

code - zero is a whole number that bf16 holds exactly, so the only rounding is that of the sums. Without groups (GROUP
0) one scale holds for all inputs and multiplies the whole sum, last. With int8 activations (x_scale given) a step's sum
is whole as well, and the result is the definition's: a fused multiply-add for each group, in order.

Grouped products are many experts' rows in one launch. Places are choices of tokens sorted by expert; a tile lies
inside one expert's run of places:

    place      0 1 2 3 4 | 5 6 | 7 ...        order[place] = token · C + choice
    tile       [0] [1]     [2]   [3]          gather: row of x is a token, row of y a place; else the other way round

Shapes: M rows, K inputs, N outputs, G groups, E experts, C choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import LANES, Packed
from .tiles import Kind, Tile

_BAND = 8  # tiles of rows that share the weights they read, while these are in the cache


@triton.jit
def _plain(acc, x, w, live_M, live_N, K, INNER: tl.constexpr):
    for k0 in range(0, K, INNER):
        k = k0 + tl.arange(0, INNER)
        a = tl.load(x[:, None] + k[None, :], live_M[:, None] & (k < K)[None, :], 0.0)
        b = tl.load(w[None, :] + k[:, None], live_N[None, :] & (k < K)[:, None], 0.0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def _step(x, codes, zero, k, live_M, K, DYNAMIC: tl.constexpr):
    """The sum over inputs `k` of x · (code - zero), fp32; exact when x is whole."""
    a = tl.load(x[:, None] + k[None, :], live_M[:, None] & (k < K)[None, :], 0.0)
    if DYNAMIC:
        a = a.to(tl.float32).to(tl.bfloat16)
    whole = codes.to(tl.int16) - zero[None, :]
    return tl.dot(a, whole.to(tl.float32).to(a.dtype), input_precision="ieee")


@triton.jit
def _panels(
    acc, x, x_scale, w, scale, zero, live_M, live_N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, DYNAMIC: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The walk over panels: w, scale and zero point at each column's place in its panel."""
    CODES: tl.constexpr = INNER * BITS // 8
    SPAN: tl.constexpr = GROUP if GROUP != 0 else INNER
    s = tl.load(scale, live_N, 0.0).to(tl.float32)
    z = tl.full(s.shape, 8 if BITS == 4 else 0, tl.int16)
    if zero is not None:
        z = tl.load(zero, live_N, 0).to(tl.int16)
    whole = tl.zeros(acc.shape, tl.int32)
    byte = tl.arange(0, CODES)
    for k1 in range(0, K, SPAN):
        if GROUP != 0:
            s = tl.load(scale + k1 // GROUP * 16, live_N, 0.0).to(tl.float32)
            if zero is not None:
                z = tl.load(zero + k1 // GROUP * 16, live_N, 0).to(tl.int16)
        part = tl.zeros(acc.shape, tl.float32)
        for step in tl.static_range(SPAN // INNER):
            k0 = k1 + step * INNER
            k = k0 + byte // 4 * (32 // BITS) + byte % 4  # of the low halves; int8 has no others
            inside = live_N[None, :] & (k - byte % 4 < K)[:, None]
            at = (k0 // (32 // BITS) + byte // 4) * 64 + byte % 4
            codes = tl.load(w[None, :] + at[:, None], inside, 0)
            if BITS == 8:
                part += _step(x, codes, z, k, live_M, K, DYNAMIC)
            else:
                part += _step(x, codes & 15, z, k, live_M, K, DYNAMIC)
                part += _step(x, codes >> 4, z, k + 4, live_M, K, DYNAMIC)
        if GROUP != 0:
            if DYNAMIC:
                acc = tl.fma(part, tl.load(x_scale + k1 // GROUP, live_M, 0.0)[:, None] * s[None, :], acc)
            else:
                acc += part * s[None, :]
        else:
            if DYNAMIC:
                whole += part.to(tl.int32)
            else:
                acc += part
    if GROUP == 0:
        if DYNAMIC:
            acc = whole.to(tl.float32) * (tl.load(x_scale, live_M, 0.0)[:, None] * s[None, :])
        else:
            acc = acc * s[None, :]
    return acc


@triton.jit
def _product(
    x, x_scale, w, scale, zero, bias, y, order, tile_expert, tile_place, ends, M, N, K, G, E, C, x_row, y_row,
    w_expert, w_row, s_expert,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, GATHER: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, COLUMNS)
    down = tl.num_programs(0) // across
    band = tl.program_id(0) // (BAND * across)
    height = min(down - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * across)
    tile_m = band * BAND + within % height
    n = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    live_N = n < N
    m = tl.arange(0, ROWS)
    if GROUPED:
        expert = tl.load(tile_expert + tile_m).to(tl.int64)
        K = tl.where(expert < E, K, 0)  # a tile past the last run walks over nothing and writes nothing
        expert = tl.minimum(expert, E - 1)
        place = tl.load(tile_place + tile_m) + m
        live_M = place < tl.load(ends + expert)
        choice = tl.load(order + place, live_M, 0)
        if GATHER:
            source = choice // C
            target = place
        else:
            source = place
            target = choice
        w += expert * w_expert
        if scale is not None:
            scale += expert * s_expert
        if zero is not None:
            zero += expert * s_expert
    else:
        source = tile_m * ROWS + m
        target = source
        live_M = source < M
    rows = x + source.to(tl.int64) * x_row
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BITS == 0:
        acc = _plain(acc, rows, w + n.to(tl.int64) * w_row, live_M, live_N, K, INNER)
    else:
        codes = w + (n // 16).to(tl.int64) * w_row + n % 16 * 4
        lane = (n // 16).to(tl.int64) * G * 16 + n % 16
        zeros = zero if zero is None else zero + lane
        x_scales = x_scale if x_scale is None else x_scale + source.to(tl.int64) * G
        acc = _panels(
            acc, rows, x_scales, codes, scale + lane, zeros, live_M, live_N, K, BITS, GROUP, x_scale is not None, INNER
        )
    if bias is not None:
        acc += tl.load(bias + n, live_N, 0.0).to(tl.float32)[None, :]
    out = y + target.to(tl.int64)[:, None] * y_row + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), live_M[:, None] & live_N[None, :])


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as the kernel reads it: [N, K] or one for each expert [E, N, K], plain (`bits` 0) or in panels."""

    w: Tensor
    columns: int
    inner: int
    bits: int = 0
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 0
    dynamic: bool = False

    @classmethod
    def of(cls, weight: Tensor | Packed) -> Matrix:
        if isinstance(weight, Tensor):
            weight = weight if weight.stride(-1) == 1 else weight.contiguous()
            return cls(weight, weight.shape[-2], weight.shape[-1])
        assert LANES == 16, "the kernel has the width of a panel built in"
        w = weight
        zeros = None if w.zeros is None else w.zeros.contiguous()
        return cls(w.codes.contiguous(), w.n, w.k, w.bits, w.scales.contiguous(), zeros, w.group, w.dynamic)

    @property
    def experts(self) -> int:
        """How many there are; 0 for one alone."""
        return self.w.shape[0] if self.w.dim() == (5 if self.bits else 3) else 0

    @property
    def groups(self) -> int:
        return 1 if self.scale is None else self.scale.shape[-2]

    def kind(self, dtype: torch.dtype) -> Kind:
        return Kind(self.columns, self.inner, self.bits, self.group, self.dynamic, dtype, str(self.w.device))


@dataclass(frozen=True, slots=True)
class Runs:
    """Places of choices, sorted by expert, cut into tiles; made without looking at the device's numbers."""

    order: Tensor
    tile_expert: Tensor
    tile_place: Tensor
    ends: Tensor
    choices: int


def multiply(
    x_MK: Tensor,
    matrix: Matrix,
    y_MN: Tensor,
    tile: Tile,
    *,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    runs: Runs | None = None,
    gather: bool = False,
) -> None:
    """Write x Wᵀ + bias into y; with `runs`, each place through its expert. `x_scale` [M, G] makes x int8 codes."""
    N, w, scale = matrix.columns, matrix.w, matrix.scale
    down = triton.cdiv(x_MK.shape[0], tile.rows) if runs is None else runs.tile_expert.shape[0]
    one = int(matrix.experts > 0)  # the dimension that counts panels or rows
    _product[(down * triton.cdiv(N, tile.columns),)](
        x_MK,
        x_scale,
        w,
        scale,
        matrix.zero,
        bias,
        y_MN,
        *((None,) * 4 if runs is None else (runs.order, runs.tile_expert, runs.tile_place, runs.ends)),
        x_MK.shape[0],
        N,
        matrix.inner,
        matrix.groups,
        max(1, matrix.experts),
        1 if runs is None else runs.choices,
        x_MK.stride(0),
        y_MN.stride(0),
        w.stride(0) if one else 0,
        w.stride(one),
        scale.stride(0) if one and scale is not None else 0,
        BITS=matrix.bits,
        GROUP=matrix.group,
        GROUPED=runs is not None,
        GATHER=gather,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        BAND=_BAND,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
