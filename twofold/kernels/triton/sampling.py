"""A token for each row of logits, by the engine's own definition, without a sort.

    logits ─▶ / temperature ─▶ exp(x - max) ─▶ min-p ─▶ top-k ─▶ top-p, of what is left ─▶ inverse CDF at u ─▶ token

Cuts are floors under the weights: a token stays if it is as heavy as the last one kept. A floor is found by halving
over the bit pattern of a weight (patterns of numbers >= 0 stand in the order of the numbers): for top-k the heaviest
floor that leaves at least k tokens, for top-p the heaviest that leaves at least that share of the mass. Sums run over
strips of one fixed size in the order of the ids, in fp64, so a row's token depends on the row alone.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sample import Choice

STRIP = 4096


@triton.jit
def _kept(w, floor, V, STRIP: tl.constexpr):
    """How many weights are not below `floor`, and their sum."""
    count = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.float64)
    for start in range(0, V, STRIP):
        v = start + tl.arange(0, STRIP)
        weight = tl.load(w + v, v < V, -1.0)
        heavy = weight >= floor
        count += tl.sum(heavy.to(tl.int32), 0)
        mass += tl.sum(tl.where(heavy, weight, 0.0).to(tl.float64), 0)
    return count, mass


@triton.jit
def _floor(w, least, wanted, V, BY_MASS: tl.constexpr, STRIP: tl.constexpr):
    """The largest floor, at least `least`, that leaves `wanted` tokens, or `wanted` of mass; `least` if none does."""
    low = least.to(tl.int32, bitcast=True)  # leaves enough
    high = tl.full((), 0x3F800001, tl.int32)  # just above 1.0, the heaviest weight: leaves nothing
    while high - low > 1:
        middle = low + (high - low) // 2
        count, mass = _kept(w, middle.to(tl.float32, bitcast=True), V, STRIP)
        if BY_MASS:
            enough = mass >= wanted
        else:
            enough = count >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _draw(
    logits, w, ids, temperatures, min_ps, top_ks, top_ps, uniforms, V, logits_row,
    STRIP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    w += row * V
    temperature = tl.load(temperatures + row)
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    top = tl.full((), float("-inf"), tl.float32)
    best = tl.zeros((), tl.int32)
    for start in range(0, V, STRIP):
        v = start + tl.arange(0, STRIP)
        x = tl.div_rn(tl.load(logits + v, v < V, float("-inf")), temperature)
        high = tl.max(x, 0)
        best = tl.where(high > top, start + tl.argmax(x, 0), best)  # of equals the lowest id
        top = tl.maximum(top, high)
    if greedy:
        tl.store(ids + row, best.to(tl.int64))
    else:
        for start in range(0, V, STRIP):
            v = start + tl.arange(0, STRIP)
            x = tl.div_rn(tl.load(logits + v, v < V, float("-inf")), temperature)
            tl.store(w + v, tl.exp(x - top), v < V)
        tl.debug_barrier()
        floor = tl.load(min_ps + row)  # the heaviest weight is 1
        top_k = tl.load(top_ks + row)
        if (top_k > 0) & (top_k < V):
            floor = tl.maximum(floor, _floor(w, tl.full((), 0.0, tl.float32), top_k, V, False, STRIP))
        top_p = tl.load(top_ps + row)
        _, mass = _kept(w, floor, V, STRIP)
        if top_p < 1.0:
            floor = _floor(w, floor, top_p * mass, V, True, STRIP)
            _, mass = _kept(w, floor, V, STRIP)
        aim = tl.load(uniforms + row) * mass
        before = tl.zeros((), tl.float64)
        chosen = tl.zeros((), tl.int32)
        found = tl.zeros((), tl.int32)
        for start in range(0, V, STRIP):
            v = start + tl.arange(0, STRIP)
            weight = tl.load(w + v, v < V, 0.0)
            weight = tl.where(weight >= floor, weight, 0.0).to(tl.float64)
            beyond = (before + tl.cumsum(weight, 0) > aim) & (weight > 0.0)
            here = tl.max(beyond.to(tl.int32), 0)
            last = tl.max(tl.where(weight > 0.0, v, -1), 0)  # where rounding leaves the aim beyond the end
            first = tl.argmax(beyond.to(tl.int32), 0) + start
            chosen = tl.where(found > 0, chosen, tl.where(here > 0, first, tl.maximum(chosen, last)))
            found = tl.maximum(found, here)
            before += tl.sum(weight, 0)
        tl.store(ids + row, chosen.to(tl.int64))


def draw(x_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """`kernels.sample.draw` on CUDA: the token of each row's floors and u, int64 [R]; it takes greedy rows too."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(choice, name) for choice in choices], dtype=dtype).to(x_RV.device)

    R, V = x_RV.shape
    ids_R = torch.empty(R, dtype=torch.int64, device=x_RV.device)
    if R:
        x_RV = x_RV.float()
        x_RV = x_RV if x_RV.stride(-1) == 1 else x_RV.contiguous()
        _draw[(R,)](
            x_RV,
            torch.empty(R, V, dtype=torch.float32, device=x_RV.device),
            ids_R,
            column("temperature", torch.float32),
            column("min_p", torch.float32),
            column("top_k", torch.int32),
            column("top_p", torch.float64),
            column("u", torch.float64),
            V,
            x_RV.stride(0),
            STRIP=min(STRIP, triton.next_power_of_2(V)),
            num_warps=8,
            enable_fp_fusion=False,
        )
    return ids_R
