"""Rotary positions, alone or on the way into the KV cache.

    q [T, H, D] ─ turn ─▶ q'                         slot of a token = block · size + row; -1 writes nothing
    k [T, K, D] ─ turn ─▶ cache [blocks, K, size, D]
    v [T, K, D] ────────▶ cache [blocks, K, size, D]   int8: with one scale for each token and head [blocks, K, size]

Shapes: T tokens, H query heads, K key-value heads, D head size, R pairs that are turned (2R <= D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import nearest

_NUMBERS = 2048  # of one program: some heads of some tokens


@triton.jit
def _turned(x, cos, sin, token, d, live, R, TURN: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A tile of heads [ROWS, BLOCK] at x (pointers to each head's first number), turned if TURN, in fp32.

    The partner of a number is read again instead of shuffled, so both layouts of pairs are one formula.
    """
    v = tl.load(x[:, None] + d[None, :], live, 0.0).to(tl.float32)
    if TURN:
        if INTERLEAVED:
            pair = d // 2
            first = d % 2 == 0
            partner = tl.where(first, d + 1, d - 1)
        else:
            pair = tl.where(d < R, d, d - R)
            first = d < R
            partner = tl.where(first, d + R, d - R)
        turning = live & (d < 2 * R)[None, :]
        other = tl.load(x[:, None] + partner[None, :], turning, 0.0).to(tl.float32)
        angle = token[:, None] * R + pair[None, :]
        c = tl.load(cos + angle, turning, 1.0)
        s = tl.load(sin + angle, turning, 0.0)
        s = tl.where(first[None, :], -s, s)
        v = tl.where(turning, v * c + other * s, v)
    return v


@triton.jit
def _rotate(
    x, y, cos, sin, T, R, H, D, token_stride, head_stride,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // H, row % H
    d = tl.arange(0, BLOCK)
    live = (token < T)[:, None] & (d < D)[None, :]
    v = _turned(x + token * token_stride + head * head_stride, cos, sin, token, d, live, R, True, INTERLEAVED)
    tl.store(y + row[:, None] * D + d[None, :], v.to(y.dtype.element_ty), live)


@triton.jit
def _keep(
    x, part, scales, slots, cos, sin, T, R, K, D, size, token_stride, head_stride, block_stride, part_head,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write keys (turned if TURN) or values to their slots; as int8 codes where `scales` is given."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // K, row % K
    d = tl.arange(0, BLOCK)
    slot = tl.load(slots + token, token < T, -1).to(tl.int64)
    written = slot >= 0
    live = written[:, None] & (d < D)[None, :]
    v = _turned(x + token * token_stride + head * head_stride, cos, sin, token, d, live, R, TURN, INTERLEAVED)
    v = v.to(x.dtype.element_ty).to(tl.float32)
    block = slot // size
    place = slot % size
    if scales is not None:
        scale = tl.max(tl.abs(v), 1) / 127.0
        tl.store(scales + (block * K + head) * size + place, scale, written)
        v = nearest(v / tl.where(scale > 0.0, scale, 1.0)[:, None])
    target = part + block * block_stride + head * part_head + place * D
    tl.store(target[:, None] + d[None, :], v.to(part.dtype.element_ty), live)


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """`kernels.rope.rotate` on CUDA."""
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    T, H, D = x_THD.shape
    if out_THD.numel():
        x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
        rows, block = _tile(D)
        _rotate[(triton.cdiv(T * H, rows),)](
            x_THD,
            out_THD,
            cos_TR.contiguous(),
            sin_TR.contiguous(),
            T,
            cos_TR.shape[1],
            H,
            D,
            x_THD.stride(0),
            x_THD.stride(1),
            INTERLEAVED=interleaved,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out_THD


def keep(
    x_TKD: Tensor,
    part: Tensor,
    slots_T: Tensor,
    scales: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> None:
    """Write keys or values [T, K, D] to their slots of one part of the cache [blocks, K, size, D].

    `angles` (cos and sin [T, R]) turn them on the way, with the bits of `rotate` and then writing. An int8 part has
    `scales` [blocks, K, size] fp32: each token's head is divided by its largest number over 127.
    """
    T, K, D = x_TKD.shape
    if not x_TKD.numel():
        return
    x_TKD = x_TKD if x_TKD.stride(-1) == 1 else x_TKD.contiguous()
    cos, sin = (None, None) if angles is None else (side.contiguous() for side in angles)
    rows, block = _tile(D)
    _keep[(triton.cdiv(T * K, rows),)](
        x_TKD,
        part,
        scales,
        slots_T,
        cos,
        sin,
        T,
        0 if cos is None else cos.shape[1],
        K,
        D,
        part.shape[2],
        x_TKD.stride(0),
        x_TKD.stride(1),
        part.stride(0),
        part.stride(1),
        TURN=cos is not None,
        INTERLEAVED=interleaved,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _tile(head_dim: int) -> tuple[int, int]:
    """Heads of one program, and the power of two that holds a head."""
    block = triton.next_power_of_2(head_dim)
    return max(1, _NUMBERS // block), block
