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

_NUMBERS = 1024  # of one program: some heads of one token


@triton.jit
def _turned(x, cos, sin, d, live, R, TURN: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A tile of heads [N, BLOCK] at x (pointers to each head's first number), turned if TURN, in fp32.

    The partner of a number is read again instead of shuffled, so both layouts of pairs are one formula.
    """
    v = tl.load(x + d[None, :], live, 0.0).to(tl.float32)
    if TURN:
        if INTERLEAVED:
            pair = d // 2
            first = d % 2 == 0
            partner = tl.where(first, d + 1, d - 1)
        else:
            pair = tl.where(d < R, d, d - R)
            first = d < R
            partner = tl.where(first, d + R, d - R)
        turning = d < 2 * R
        other = tl.load(x + partner[None, :], live & turning[None, :], 0.0).to(tl.float32)
        c = tl.load(cos + pair, turning, 1.0)
        s = tl.load(sin + pair, turning, 0.0)
        s = tl.where(first, -s, s)
        v = tl.where(turning[None, :], v * c[None, :] + other * s[None, :], v)
    return v


@triton.jit
def _rotate(
    x,
    y,
    cos,
    sin,
    R,
    H,
    D,
    token_stride,
    head_stride,
    y_token,
    y_head,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    live = (head < H)[:, None] & (d < D)[None, :]
    source = x + token * token_stride + head[:, None] * head_stride
    v = _turned(source, cos + token * R, sin + token * R, d, live, R, True, INTERLEAVED)
    tl.store(y + token * y_token + head[:, None] * y_head + d[None, :], v.to(y.dtype.element_ty), live)


@triton.jit
def _keep(
    x,
    part,
    scales,
    slots,
    cos,
    sin,
    R,
    K,
    D,
    size,
    token_stride,
    head_stride,
    block_stride,
    part_head,
    TURN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write keys (turned when TURN) or values to their slots; as int8 codes where `scales` is given."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK)
    written = (head < K) & (slot >= 0)
    live = written[:, None] & (d < D)[None, :]
    source = x + token * token_stride + head[:, None] * head_stride
    v = _turned(source, cos + token * R, sin + token * R, d, live, R, TURN, INTERLEAVED)
    v = v.to(x.dtype.element_ty).to(tl.float32)
    block = slot // size
    row = slot % size
    if scales is not None:
        scale = tl.max(tl.abs(v), 1) / 127.0
        tl.store(scales + (block * K + head) * size + row, scale, written)
        v = v / tl.where(scale > 0.0, scale, 1.0)[:, None]
        v = nearest(v)
    target = part + block * block_stride + head[:, None] * part_head + row * D + d[None, :]
    tl.store(target, v.to(part.dtype.element_ty), live)


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """`kernels.rope.rotate` on CUDA."""
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    T, H, D = x_THD.shape
    if out_THD.numel():
        x_THD = x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
        heads, block = _tile(D)
        _rotate[(T, triton.cdiv(H, heads))](
            x_THD,
            out_THD,
            cos_TR.contiguous(),
            sin_TR.contiguous(),
            cos_TR.shape[1],
            H,
            D,
            x_THD.stride(0),
            x_THD.stride(1),
            out_THD.stride(0),
            out_THD.stride(1),
            INTERLEAVED=interleaved,
            HEADS=heads,
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
    heads, block = _tile(D)
    _keep[(T, triton.cdiv(K, heads))](
        x_TKD,
        part,
        scales,
        slots_T,
        x_TKD if cos is None else cos,
        x_TKD if sin is None else sin,
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
        HEADS=heads,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _tile(head_dim: int) -> tuple[int, int]:
    """Heads of one program, and the power of two that holds a head."""
    block = triton.next_power_of_2(head_dim)
    return max(1, _NUMBERS // block), block
