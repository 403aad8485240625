"""Products with quantized weights, w = scale · (code − zero): the exact arithmetic, and the panels it is computed from.

Two kinds of weights that other tools make are kept as they are too, for float activations: codes that are themselves
small floats (e4m3), and zeros that are floats, which are then added: w = scale · code + zero.

    codes of a panel of 16 outputs      int8  [N/16][K/4][16 outputs][4 inputs]   s8, or e4m3
                                        int4  [N/16][K/8][16 outputs][4 bytes]    inputs 0-3 in the low halves of the
                                                                                  bytes, inputs 4-7 in the high ones
    scales, zeros                             [N/16][groups][16 outputs]

N is filled up to 16 with rows of scale 0, K to whole groups (one group of all of K: to 8) with codes equal to zero's.

With int8 activations, the sum over a group is a whole number, exact in any order of additions; groups are then folded
in increasing order, each by one fused multiply-add. So every instruction set has the same bits. With float activations
the weights are widened to fp32, and the product is `linear`'s.

Shapes: T tokens, K inputs, N outputs, G groups of k inputs, E experts, C experts chosen for a token, P panels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, panels
from .activation import gated
from .grouped import present
from .linear import linear
from .op import op

LANES = 16
EVEN = 8  # inputs that one step of a panel holds, for either width of code
SMALLEST = 2.0**-100  # a group of activations whose largest number is below counts as zeros
_LOW = 0x0F0F_0F0F  # the low half of each of four bytes
_TIE, _BELOW = 0x1000_0000, 0x1FFF_FFFF  # the 29 bits that fp32 drops from an fp64: half a step, and their mask


class Packed(NamedTuple):
    """A quantized weight in panels: `codes` int8 or e4m3, or uint8 with two int4 each; `scales`; `zeros`, None when
    symmetric.

    `group` is how many inputs share a scale, 0 for all; `dynamic` says that activations are rounded to int8 by row and
    group. Experts have one more dimension in front.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    group: int
    dynamic: bool

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def offset(self) -> bool:
        """Whether zeros are floats that are added."""
        return self.zeros is not None and self.zeros.is_floating_point()

    @property
    def whole(self) -> bool:
        """Whether codes and zeros are whole numbers."""
        return not self.offset and not self.codes.is_floating_point()

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros) if t is not None)

    def expert(self, index: int) -> Packed:
        """One of the experts, a view."""
        zeros = self.zeros[index] if self.zeros is not None else None
        return self._replace(codes=self.codes[index], scales=self.scales[index], zeros=zeros)


class Logical(NamedTuple):
    """The same weight as numbers one can read: codes [N, K] (int8, e4m3, uint8 of 0..15), scale [N, G], zero [N, G]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def neutral(codes: Tensor) -> int:
    """The zero of a symmetric weight: 0 for int8, 8 for int4."""
    return 8 if codes.dtype == torch.uint8 else 0


def plain(w: Packed) -> bool:
    """Whether every kernel takes this weight: whole numbers in groups of 32 or more. The others are widened first."""
    return w.whole and w.group != 16


# -------------------------------------------------------------------------------------------------- panels
def pack(logical: Logical, group: int, dynamic: bool) -> Packed:
    """Logical codes [..., N, K] into panels."""
    codes_NK, scale_NG, zero_NG = logical
    n, k = codes_NK.shape[-2:]
    idle = neutral(codes_NK)
    kind = codes_NK.dtype
    codes_NK = codes_NK.view(torch.int8) if codes_NK.is_floating_point() else codes_NK
    wide = -k % (group or EVEN)
    offset = zero_NG is not None and zero_NG.is_floating_point()
    if wide and zero_NG is not None and not offset:
        codes_NK = torch.cat((codes_NK, zero_NG[..., -1:].expand(*zero_NG.shape[:-1], wide)), -1)
    elif wide:
        codes_NK = F.pad(codes_NK, (0, wide), value=idle)
    rows = -n % LANES
    codes_NK = F.pad(codes_NK, (0, 0, 0, rows), value=idle)
    scale_NG = F.pad(scale_NG, (0, 0, 0, rows))
    zero_NG = F.pad(zero_NG, (0, 0, 0, rows), value=0.0 if offset else idle) if zero_NG is not None else None
    return Packed(
        codes=_codes_to_panels(codes_NK).view(kind),
        scales=_by_lanes(scale_NG),
        zeros=_by_lanes(zero_NG) if zero_NG is not None else None,
        n=n,
        k=k,
        group=group,
        dynamic=dynamic,
    )


def unpack(w: Packed) -> Logical:
    """Panels back into logical codes, without what was filled up."""
    fours = w.codes.contiguous().flatten(-2).view(torch.int32).transpose(-2, -1).flatten(-3, -2)
    if w.bits == 4:
        fours = torch.stack((fours & _LOW, fours >> 4 & _LOW), -1).flatten(-2)
    codes_NK = fours.clone(memory_format=torch.contiguous_format).view(w.codes.dtype)
    scale_NG, zero_NG = (
        t.transpose(-2, -1).flatten(-3, -2)[..., : w.n, :] if t is not None else None for t in (w.scales, w.zeros)
    )
    assert scale_NG is not None
    return Logical(codes_NK[..., : w.n, : w.k], scale_NG, zero_NG)


def _codes_to_panels(codes_NK: Tensor) -> Tensor:
    """Four bytes travel as one int32; of int4, four inputs share theirs with the four after them."""
    *lead, n, _ = codes_NK.shape
    fours = codes_NK.clone(memory_format=torch.contiguous_format).view(torch.int32)
    if codes_NK.dtype == torch.uint8:
        fours = fours[..., 0::2] | fours[..., 1::2] << 4
    panels = fours.reshape(*lead, n // LANES, LANES, fours.shape[-1]).transpose(-2, -1)
    panels = panels.clone(memory_format=torch.contiguous_format)
    return panels.view(codes_NK.dtype).view(*panels.shape, 4)


def _by_lanes(x_NG: Tensor) -> Tensor:
    *lead, n, g = x_NG.shape
    return x_NG.reshape(*lead, n // LANES, LANES, g).transpose(-2, -1).contiguous()


# -------------------------------------------------------------------------------------------------- arithmetic
def dequantize(logical: Logical, group: int) -> Tensor:
    """The weights as fp32 [..., N, K]; exact for scales of bf16 and fp16."""
    codes_NK, scale_NG, zero_NG = logical
    k = codes_NK.shape[-1]
    scale_NK = _spread(scale_NG.float(), group, k)
    if zero_NG is not None and zero_NG.is_floating_point():
        return codes_NK.float() * scale_NK + _spread(zero_NG, group, k)
    zero = neutral(codes_NK) if zero_NG is None else _spread(zero_NG.float(), group, k)
    return (codes_NK.float() - zero) * scale_NK


def _spread(x_NG: Tensor, group: int, k: int) -> Tensor:
    """One number a group to one an input."""
    return x_NG.repeat_interleave(group, -1)[..., :k] if group else x_NG


@op
def quantize_rows(x_TK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Activations as int8 codes [T, K] and fp32 scales [T, G]: largest / 127, rounded to the nearest, ties to even.

    A group with a number that is not finite has codes 0 and scale NaN, so that its products are NaN.
    """
    x_TGk = by_groups(x_TK.float(), group)
    top_TG = x_TGk.abs().amax(-1)
    some_TG = (top_TG > SMALLEST) & torch.isfinite(top_TG)
    inverse_TG = torch.where(some_TG, 127.0 / top_TG, 0.0)
    codes_TGk = torch.where(some_TG[..., None], torch.round(x_TGk * inverse_TG[..., None]), 0.0).to(torch.int8)
    scale_TG = torch.where(some_TG, top_TG / 127.0, 0.0).masked_fill(~torch.isfinite(top_TG), torch.nan)
    return codes_TGk.flatten(-2)[:, : x_TK.shape[-1]], scale_TG


def by_groups(x_TK: Tensor, group: int) -> Tensor:
    """[..., K] as [..., G, k], filled up with zeros; one group of all of K when `group` is 0."""
    if not group:
        return x_TK[..., None, :]
    *lead, k = x_TK.shape
    return F.pad(x_TK, (0, -k % group)).reshape(*lead, -(-k // group), group)


def multiply(x_TK: Tensor, logical: Logical, group: int, dynamic: bool, b_N: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in fp32 from logical codes: the definition."""
    if not dynamic:
        return linear(x_TK.float(), dequantize(logical, group), b_N)
    codes_NK, scale_NG, zero_NG = logical
    a_TK, scale_TG = quantize_rows.reference(x_TK, group)
    zero_NG = zero_NG.float() if zero_NG is not None else scale_NG.new_full((), neutral(codes_NK)).float()
    k = group or codes_NK.shape[-1]
    exact = torch.float32 if k * 127 * 255 < 2**24 else torch.float64
    whole_NK = codes_NK.float() - (_spread(zero_NG, group, codes_NK.shape[-1]) if zero_NG.dim() else zero_NG)
    whole_GNk = by_groups(whole_NK.to(exact), group).transpose(0, 1)
    a_GTk = by_groups(a_TK.to(exact), group).transpose(0, 1)
    y_TN = x_TK.new_zeros(x_TK.shape[0], codes_NK.shape[0], dtype=torch.float32)
    for g, (a_Tk, whole_Nk) in enumerate(zip(a_GTk, whole_GNk, strict=True)):
        sums_TN = (a_Tk @ whole_Nk.t()).float()
        y_TN = fused_multiply_add(sums_TN, scale_TG[:, g, None] * scale_NG[:, g].float(), y_TN)
    return y_TN if b_N is None else y_TN + b_N


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c of fp32, rounded once, as the processor's instruction does.

    In fp64 the product is exact and the sum rounded; rounding again to fp32 goes astray only where the first rounding
    made a tie (or where fp32 is subnormal), and there the sum is rounded to odd instead (Boldo and Melquiond 2008).
    """
    a, b, c = (x.double() for x in torch.broadcast_tensors(a, b, c))
    near = torch.addcmul(c, a, b)
    doubtful = (near.view(torch.int64) & _BELOW) == _TIE
    doubtful |= (near.abs() < torch.finfo(torch.float32).tiny) & (near != 0)
    if bool(doubtful.any()):
        near[doubtful] = _to_odd(near[doubtful], a[doubtful] * b[doubtful], c[doubtful])
    return near.float()


def _to_odd(near: Tensor, product: Tensor, c: Tensor) -> Tensor:
    """product + c rounded to odd, from the sum rounded to `near`est: what was lost is exact (Knuth's two-sum)."""
    back = near - product
    lost = (product - (near - back)) + (c - back)
    odd = torch.nextafter(near, torch.copysign(torch.full_like(lost, torch.inf), lost))
    even = (near.view(torch.int64) & 1) == 0
    return torch.where(even & (lost != 0), odd, near)


# -------------------------------------------------------------------------------------------------- ops
@op
def quantized_linear(x_TK: Tensor, w: Packed, b_N: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for a weight in panels: [T, K] to [T, N], in x's dtype."""
    return multiply(x_TK, unpack(w), w.group, w.dynamic, b_N).to(x_TK.dtype)


@quantized_linear.on("native", why="whole numbers from panels as they lie, the same bits", missing=native.missing)
def _product(x_TK: Tensor, w: Packed, b_N: Tensor | None = None) -> Tensor:
    return panels.product(x_TK, w, b_N) if panels.fits(w, x_TK) else quantized_linear.reference(x_TK, w, b_N)


@op
def quantized_rows(ids_T: Tensor, w: Packed) -> Tensor:
    """Rows of a table in panels, widened to fp32: [T] to [T, K]."""
    panel_T, lane_T = ids_T // LANES, ids_T % LANES
    zeros = w.zeros[panel_T, :, lane_T] if w.zeros is not None else None
    kind = torch.int8 if w.codes.is_floating_point() else w.codes.dtype
    codes = w.codes.view(kind)[panel_T, :, lane_T].view(w.codes.dtype)  # [T, K/4, 4] or, two to a byte, [T, K/8, 4]
    codes_TK = codes.flatten(-2) if w.bits == 8 else torch.stack((codes & 15, codes >> 4), -2).flatten(-3)
    return dequantize(Logical(codes_TK[:, : w.k], w.scales[panel_T, :, lane_T], zeros), w.group)


@quantized_rows.on("native", why="one pass, no index tensors", missing=native.missing)
def _rows(ids_T: Tensor, w: Packed) -> Tensor:
    return panels.rows_of(ids_T, w) if panels.fits(w) else quantized_rows.reference(ids_T, w)


@op
def quantized_experts(
    x_TD: Tensor, gate_up: Packed, down: Packed, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    """`experts` for weights in panels: the weighted sum of each token's experts, added in expert order."""
    out_TD = torch.zeros_like(x_TD)
    for expert in present(experts_TC):
        token, choice = torch.where(experts_TC == expert)
        hidden = gated(quantized_linear(x_TD[token], gate_up.expert(expert)), act)
        share = quantized_linear(hidden, down.expert(expert)) * weights_TC[token, choice, None].to(x_TD.dtype)
        out_TD = out_TD.index_add(0, token, share)
    return out_TD
