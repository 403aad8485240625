"""Attention of whole sequences, as training and scoring see them: the walk of `walk.py`, forward and backward.

Shapes: T tokens of sequences end to end, H query heads = K key-value heads x G, D head size; B sequences that walk
together, L tokens of each, M = L·G rows, Z = B·K.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, stages
from .op import op
from .paged import Panels, Spans, cache_shapes, keep, narrowed, paged_attention, run, to_bytes
from .walk import KEYS, Attend, Fold, biased, blocks_of, fits, grouped, look, mask, scores, tile_mask, ungrouped, walk

__all__ = [
    "KEYS",
    "Attend",
    "Fold",
    "cache_shapes",
    "grouped",
    "look",
    "mask",
    "packed_attention",
    "scores",
    "ungrouped",
]


@op
def packed_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], how: Attend) -> Tensor:
    """Attention inside each of the sequences that lie end to end on T, one sequence at a time: [T, H, D]."""
    fits(how, lengths)
    out, at = [], 0
    qkv = _kept(q_THD, k_TKD, v_TKD, how)
    for length in lengths:
        piece = slice(at, at + length)
        at += length
        if not length:
            continue
        q, k, v = (x[None, piece].float() for x in qkv)
        folded, _ = walk(q, k, v, how)
        out.append(folded[0])
    return torch.cat(out).to(q_THD.dtype) if out else torch.empty_like(q_THD)


def _kept(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a cache of `how.kept` would have them."""
    if how.kept is None:
        return q_THD, k_TKD, v_TKD
    if how.kept == torch.float8_e4m3fn:
        codes, scales = zip(*(narrowed(x, how.kept) for x in (k_TKD, v_TKD)), strict=True)
        k, v = (code.float() * scale[..., None] for code, scale in zip(codes, scales, strict=True))
        return q_THD, k, v
    if how.kept != torch.int8:
        return q_THD, *(x.to(how.kept).to(x.dtype) for x in (k_TKD, v_TKD))  # type: ignore[return-value]
    codes, scales = zip(*(to_bytes(x) for x in (q_THD * how.scale, k_TKD, v_TKD)), strict=True)
    q, k, v = (code.float() * scale[..., None] for code, scale in zip(codes, scales, strict=True))
    return q / how.scale, k, v


@packed_attention.on(
    "native",
    why="the engine's own walk over panels; backward recomputes the scores",
    missing=native.missing,
    bits="own",
)
def _native(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], how: Attend) -> Tensor:
    if q_THD.dtype != torch.float32 or q_THD.device.type != "cpu":
        return _together(q_THD, k_TKD, v_TKD, lengths, how)
    out: Tensor = _Panelled.apply(q_THD, k_TKD, v_TKD, tuple(lengths), how)
    return out


@packed_attention.on("together", why="sequences of like length walk together; backward recomputes the scores")
def _together(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], how: Attend) -> Tensor:
    fits(how, lengths)
    out: Tensor = _Packed.apply(q_THD, k_TKD, v_TKD, tuple(lengths), how)
    return out


class _Panelled(torch.autograd.Function):
    """Keys and values into panels, and the engine's attention over them; backward from the saved log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: tuple[int, ...], how: Attend) -> Tensor:
        spans, used = [], 0
        for length in lengths:
            blocks = -(-length // KEYS)
            spans.append((0, length, range(used, used + blocks)))
            used += blocks
        (_, K, D), tokens = k_TKD.shape, Spans(spans, KEYS)
        panels = Panels.zeros(used, K, KEYS, D, how.kept or torch.float32)
        keep(k_TKD, v_TKD, panels, tokens)
        lse_TH = torch.empty(q_THD.shape[:2])
        out_THD = paged_attention(q_THD, panels, tokens, how, lse_TH=lse_TH)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, lse_TH)
        ctx.how, ctx.lengths = how, lengths
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THD, k_TKD, v_TKD, out_THD, lse_TH = ctx.saved_tensors
        return *_backward(q_THD, k_TKD, v_TKD, out_THD, lse_TH, grads[0], ctx.lengths, ctx.how), None, None


def _backward(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_TH: Tensor,
    grad_THD: Tensor,
    lengths: tuple[int, ...],
    how: Attend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the CPU kernel, through what was kept of them as if nothing had been rounded."""
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    read = [x.contiguous() for x in (*_kept(q_THD, k_TKD, v_TKD, how), out_THD, grad_THD, lse_TH)]
    found = [torch.empty(T, heads, D) for heads in (H, K, K)]
    slopes_H = None if how.slopes is None else torch.tensor(how.slopes, dtype=torch.float32)
    table = None if how.sparse is None else how.sparse.table()
    spans = Spans([(0, length, range(-(-length // KEYS))) for length in lengths], KEYS)
    names = ("q", "k", "v", "out", "grad", "lse", "dq", "dk", "dv")
    stage = stages.AttentionBackward(
        heads=H,
        kv_heads=K,
        dim=D,
        window=how.window or 0,
        scale=how.scale,
        softcap=how.softcap or 0.0,
        slopes=None if slopes_H is None else slopes_H.data_ptr(),
        sparse=stages.Sparse() if table is None else table.struct(),
        ahead=not how.causal,
        **{name: x.data_ptr() for name, x in zip(names, (*read, *found), strict=True)},
    )
    stage.step = ctypes.pointer(spans.struct)
    run(stage)
    return found[0], found[1], found[2]


class _Packed(torch.autograd.Function):
    """The walk forward; backward from the saved log-sum-exp, block by block, as FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: tuple[int, ...], how: Attend) -> Tensor:
        q_THD, k_TKD, v_TKD = _kept(q_THD, k_TKD, v_TKD, how)
        out_THD = torch.empty_like(q_THD)
        saved: list[Tensor] = [q_THD, k_TKD, v_TKD, out_THD]
        ctx.how, ctx.bundles = how, []
        for index_BL, kept_BL in bundles(lengths, q_THD.device, 1 if not how.causal else KEYS):
            q, k, v = (x[index_BL].float() for x in (q_THD, k_TKD, v_TKD))
            folded, lse = walk(q, k, v, how)
            out_THD[index_BL[kept_BL]] = folded[kept_BL].to(out_THD.dtype)
            saved.append(lse)
            ctx.bundles.append((index_BL, kept_BL))
        ctx.save_for_backward(*saved)
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad_THD,) = grads
        q_THD, k_TKD, v_TKD, out_THD, *lses = ctx.saved_tensors
        found = [torch.zeros_like(x) for x in (q_THD, k_TKD, v_TKD)]
        for (index_BL, kept_BL), lse in zip(ctx.bundles, lses, strict=True):
            q, k, v, out, grad = (x[index_BL].float() for x in (q_THD, k_TKD, v_TKD, out_THD, grad_THD))
            grad = grad * kept_BL[:, :, None, None]
            for whole, part in zip(found, walk_backward(q, k, v, out, grad, lse, ctx.how), strict=True):
                whole[index_BL[kept_BL]] = part[kept_BL].to(whole.dtype)
        return found[0], found[1], found[2], None, None


def bundles(lengths: Sequence[int], device: torch.device, alike: int = KEYS) -> list[tuple[Tensor, Tensor]]:
    """Sequences that span the same number of `alike` tokens (blocks of keys), padded to the longest of them.

    A query that looks ahead would see the padding: such sequences walk together only when they are of one length.

    Returns pairs of the token index of each place [B, L] and whether the place is real [B, L].
    """
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    by_blocks: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        if length:
            by_blocks.setdefault(-(-length // alike), []).append(i)
    out = []
    for _, members in sorted(by_blocks.items()):
        size = torch.tensor([lengths[i] for i in members], device=device)
        first = torch.tensor([starts[i] for i in members], device=device)
        place_L = torch.arange(int(size.max()), device=device)
        kept_BL = place_L < size[:, None]
        out.append((torch.where(kept_BL, first[:, None] + place_L, first[:, None]), kept_BL))
    return out


def walk_backward(
    q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, out: Tensor, grad: Tensor, lse_ZM1: Tensor, how: Attend
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, tile by tile as `_walk` goes; the products are the library's, free of the contract."""
    B, L, H, D = q_BLHD.shape
    K = k_BLKD.shape[2]
    G = H // K
    q_ZMD, grad_ZMD = grouped(q_BLHD * how.scale, K), grouped(grad, K)
    delta_ZM1 = (grouped(out, K) * grad_ZMD).sum(-1, keepdim=True)
    k_ZLD, v_ZLD = (x.transpose(1, 2).reshape(B * K, L, D) for x in (k_BLKD, v_BLKD))
    dq, dk, dv = torch.zeros_like(q_ZMD), torch.zeros_like(k_ZLD), torch.zeros_like(v_ZLD)
    for first in range(0, L, KEYS):
        last = min(first + KEYS, L)
        rows = slice(first * G, last * G)
        q, g, lse, delta = q_ZMD[:, rows], grad_ZMD[:, rows], lse_ZM1[:, rows], delta_ZM1[:, rows]
        for start in blocks_of(first, last, how, L):
            keys = slice(start, min(start + KEYS, L))
            k, v = k_ZLD[:, keys], v_ZLD[:, keys]
            hidden, gap = tile_mask(first, last, start, k.shape[1], B, how, K, q.device, L)
            raw = torch.bmm(q, k.mT)
            slope = None if how.softcap is None else 1.0 - torch.tanh(raw / how.softcap).square_()
            p = biased(raw, hidden, gap, how).sub_(lse).exp_()
            dv[:, keys] += torch.bmm(p.mT, g)
            ds = torch.bmm(g, v.mT).sub_(delta).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dq[:, rows] += torch.bmm(ds, k)
            dk[:, keys] += torch.bmm(ds.mT, q)
    dk_BLKD, dv_BLKD = (x.view(B, K, L, D).transpose(1, 2) for x in (dk, dv))
    return ungrouped(dq.mul_(how.scale), B, H), dk_BLKD, dv_BLKD
