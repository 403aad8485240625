"""Mixture of experts in five launches: route, sort choices by expert, two grouped products, and a sum in expert order.

Nothing here waits for the device: the number of tiles is a bound that depends on shapes alone, so a step with experts
can be captured as a graph.

Shapes: T tokens, D hidden, E experts, F expert width, C choices of a token, P = T·C places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import Packed, plain
from ..quantized import quantized_experts as experts_by_widening
from .activation import gated
from .linear import activations, noise_product
from .product import Matrix, Runs, multiply
from .tiles import choose


@triton.jit
def _route(
    logits, bias, weights, experts, T, E, C,
    BIASED: tl.constexpr, RENORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK)
    live = (row < T)[:, None] & (e < E)[None, :]
    x = tl.load(logits + row[:, None].to(tl.int64) * E + e[None, :], live, float("-inf")).to(tl.float32)
    x = tl.where((row < T)[:, None], x, 0.0)
    p = tl.exp(x - tl.max(x, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    merit = p
    if BIASED:
        merit = p + tl.load(bias + e, e < E, 0.0)[None, :]
    merit = tl.where((e < E)[None, :], merit, float("-inf"))
    left = merit
    total = tl.full((ROWS,), 1.0, tl.float32)
    if RENORMALISE:
        total = tl.zeros((ROWS,), tl.float32)
        for _ in range(C):
            best = e[None, :] == tl.argmax(left, 1)[:, None]
            total += tl.sum(tl.where(best, p, 0.0), 1)
            left = tl.where(best, float("-inf"), left)
        left = merit
    for c in range(C):
        chosen = tl.argmax(left, 1)  # of equals the first
        best = e[None, :] == chosen[:, None]
        tl.store(weights + row * C + c, tl.sum(tl.where(best, p, 0.0), 1) / total, row < T)
        tl.store(experts + row * C + c, chosen.to(tl.int64), row < T)
        left = tl.where(best, float("-inf"), left)


@triton.jit
def _combine(share, weights, experts, experts_order, out, D, C, BLOCK: tl.constexpr):
    """Each token's shares, weighted and added in the order of their experts; a negative expert has none."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = d < D
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(C):
        choice = token * C + tl.load(experts_order + token * C + c)
        there = live & (tl.load(experts + choice) >= 0)
        part = tl.load(share + choice * D + d, there, 0.0).to(tl.float32)
        weight = tl.load(weights + choice).to(share.dtype.element_ty).to(tl.float32)
        total += (part * weight).to(share.dtype.element_ty).to(tl.float32)
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), live)


def route(logits_TE: Tensor, top_k: int, renormalise: bool, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kernels.moe.route` on CUDA; of equals the lowest expert is chosen."""
    T, E = logits_TE.shape
    weights_TC = torch.empty(T, top_k, dtype=torch.float32, device=logits_TE.device)
    experts_TC = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    if T:
        block = triton.next_power_of_2(E)
        rows = max(1, 1024 // block)
        _route[(triton.cdiv(T, rows),)](
            logits_TE.contiguous(),
            logits_TE if bias_E is None else bias_E.contiguous(),
            weights_TC,
            experts_TC,
            T,
            E,
            top_k,
            BIASED=bias_E is not None,
            RENORMALISE=renormalise,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return weights_TC, experts_TC


def runs(experts_TC: Tensor, num_experts: int, rows: int) -> Runs:
    """Sort the choices by expert and cut each expert's run into tiles of `rows` places; negative ones have no tile."""
    T, C = experts_TC.shape
    flat_P = experts_TC.reshape(-1)
    flat_P = torch.where(flat_P < 0, num_experts, flat_P)  # behind all others
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_P.device)
    counts_E = counts_E.scatter_add_(0, flat_P, torch.ones_like(flat_P))[:num_experts]
    ends_E = counts_E.cumsum(0)
    tiles_E = (counts_E + rows - 1) // rows
    tile_ends_E = tiles_E.cumsum(0)
    bound = min(T * C, triton.cdiv(T * C, rows) + num_experts)
    tile = torch.arange(bound, device=flat_P.device)
    expert = torch.searchsorted(tile_ends_E, tile, right=True)
    inside = expert.clamp(max=num_experts - 1)
    within = tile - (tile_ends_E - tiles_E)[inside]
    return Runs(
        order=torch.argsort(flat_P, stable=True).int(),
        tile_expert=expert.int(),
        tile_place=((ends_E - counts_E)[inside] + within * rows).int(),
        ends=ends_E.int(),
        choices=C,
    )


def experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    """`kernels.moe.experts` on CUDA.

    A choice's product is rounded, weighted and rounded again as in the definition; their sum is fp32, rounded once.
    """
    return _experts(x_TD, Matrix.of(gate_up_E2FD), Matrix.of(down_EDF), weights_TC, experts_TC, act)


def quantized_experts(
    x_TD: Tensor, gate_up: Packed, down: Packed, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    """`kernels.quantized.quantized_experts` on CUDA."""
    if not (plain(gate_up) and plain(down)):
        return experts_by_widening.reference(x_TD, gate_up, down, weights_TC, experts_TC, act)
    return _experts(x_TD, Matrix.of(gate_up), Matrix.of(down), weights_TC, experts_TC, act)


def _experts(x_TD: Tensor, up: Matrix, down: Matrix, weights_TC: Tensor, experts_TC: Tensor, act: str) -> Tensor:
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if not out_TD.numel():
        return out_TD
    (T, D), C, E = x_TD.shape, experts_TC.shape[1], up.experts
    each = triton.cdiv(T * C, E)  # rows of an expert, were they shared out evenly: it only chooses among alike tiles
    first, second = (choose(matrix.kind(x_TD.dtype), each, noise_product) for matrix in (up, down))
    by_first = runs(experts_TC, E, first.rows)
    by_second = by_first if second.rows == first.rows else runs(experts_TC, E, second.rows)
    wide = torch.empty(T * C, up.columns, dtype=x_TD.dtype, device=x_TD.device)
    x, scale = activations(x_TD, up)
    multiply(x, up, wide, first, x_scale=scale, runs=by_first, gather=True)
    share = torch.empty(T * C, D, dtype=x_TD.dtype, device=x_TD.device)
    x, scale = activations(gated(wide, act), down)
    multiply(x, down, share, second, x_scale=scale, runs=by_second)
    block = min(1024, triton.next_power_of_2(D))
    _combine[(T, triton.cdiv(D, block))](
        share,
        weights_TC.contiguous(),
        experts_TC.contiguous(),
        experts_TC.argsort(-1),
        out_TD,
        D,
        C,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out_TD
