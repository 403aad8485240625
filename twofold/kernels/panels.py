"""Products with quantized weights by the native kernels: from a `Packed` weight to stages of a program.

    stages_for(...) ▸ Quantize: rows of floats to int8 codes, a scale and a sum for each row and group
                    ▸ QuantizedLinear: whole numbers times panels, groups folded in order, bias, activation, gate

Weight-only formats take the second alone. The bits are those of `quantized.multiply` on every instruction set.

Shapes: T tokens, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native, stages

if TYPE_CHECKING:
    from .quantized import Packed

LINE = 64  # bytes that travel together; rows of codes end one later, so that they do not share sets of the cache


class RoundWeights(ctypes.Structure):
    """The stage of `cpu/round.cpp`, field by field."""

    _fields_ = (
        ("w", ctypes.c_void_p),
        ("w_stride", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("out", stages.Panels),
        ("bad", ctypes.c_void_p),
    )


class Rounding:
    """Memory for at most `rows` rows of rounded activations, one for each kind of weight; keep it with the stages.

    A program's products run one after another, so products of one kind share theirs.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._made: dict[tuple[int, int], tuple[stages.Rounded, tuple[Tensor, ...]]] = {}
        self._wide: dict[int, Tensor] = {}
        self._reordered: dict[int, Tensor] = {}

    def of(self, w: Packed) -> stages.Rounded:
        """Where activations for products with `w` go."""
        inputs, groups = inputs_of(w), w.scales.shape[-2]
        if (inputs, groups) not in self._made:
            stride = -(-inputs // LINE) * LINE + LINE
            parts = (
                torch.empty(self.rows, stride, dtype=torch.int8),
                torch.empty(self.rows, groups),
                torch.empty(self.rows, groups, dtype=torch.int32),
            )
            codes, scales, sums = (part.data_ptr() for part in parts)
            self._made[inputs, groups] = stages.Rounded(codes, scales, sums, stride, groups), parts
        return self._made[inputs, groups][0]

    def wide(self, width: int) -> Tensor:
        """Room for gates and ups side by side, where their panels overlap."""
        return self._wide.setdefault(width, torch.empty(self.rows, width))

    def reordered(self, width: int) -> Tensor:
        """Room for rows in the order of a weight's groups."""
        return self._reordered.setdefault(width, torch.empty(self.rows, width))


def inputs_of(w: Packed) -> int:
    """K as the panels have it, filled up."""
    return w.codes.shape[-3] * (4 if w.bits == 8 else 8)


def panels_of(w: Packed) -> stages.Panels:
    """The struct of a weight; whoever writes it into a stage keeps the weight."""
    inputs, groups = inputs_of(w), w.scales.shape[-2]
    return stages.Panels(
        codes=w.codes.data_ptr(),
        scales=stages.numbers(w.scales),
        zeros=None if w.zeros is None or w.offset else w.zeros.data_ptr(),
        offsets=w.zeros.data_ptr() if w.zeros is not None and w.offset else None,
        bits=w.bits,
        group=w.group or inputs,
        inputs=inputs,
        groups=groups,
        floats=w.codes.is_floating_point(),
    )


def stages_for(
    a_TK: Tensor,
    w: Packed,
    b_N: Tensor | None,
    out: Tensor,
    rows: int,
    rounding: Rounding,
    *,
    act: str = "none",
    gated: bool = False,
    order_K: Tensor | None = None,
) -> list[ctypes.Structure]:
    """The stages of out = act(a Wᵀ + b), as `linear.stage_of` for a weight in panels; `order_K` is its inputs' order.

    `rows` is the address of the row count, read when the stages run, at most `rounding.rows`. `gated`: w holds the
    gates' rows and then the ups', and out = act(gate) · up.
    """
    if order_K is not None:
        mine = rounding.reordered(w.k)
        after = stages_for(mine, w, b_N, out, rows, rounding, act=act, gated=gated)
        return [reorder_stage(a_TK, order_K, mine, rows), *after]
    if gated and w.n // 2 % 16:
        wide = rounding.wide(w.n)
        return [*stages_for(a_TK, w, b_N, wide, rows, rounding), wide_gate(wide, out, rows, act)]
    multiply = stages.QuantizedLinear(
        rows=rows,
        n=w.n // 2 if gated else w.n,
        k=w.k,
        act=stages.ACTS[act],
        gated=gated,
        w=panels_of(w),
        bias=stages.numbers(b_N),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )
    if w.dynamic:
        rounded = quantize_stage(a_TK, w, rows, rounding)
        multiply.rounded = rounded.out
        return [rounded, multiply]
    multiply.a, multiply.a_stride = a_TK.data_ptr(), a_TK.stride(0)
    return [multiply]


def quantize_stage(a_TK: Tensor, w: Packed, rows: int, rounding: Rounding) -> stages.Quantize:
    """The stage that rounds activations for products with `w`."""
    return stages.Quantize(
        rows=rows,
        k=w.k,
        group=w.group or inputs_of(w),
        a=a_TK.data_ptr(),
        a_stride=a_TK.stride(0),
        out=rounding.of(w),
    )


def reorder_stage(x_TK: Tensor, order_K: Tensor, out: Tensor, rows: int) -> stages.Reorder:
    """The stage that puts each row's numbers into the order of a weight's groups."""
    return stages.Reorder(
        rows=rows,
        order=order_K.data_ptr(),
        width=len(order_K),
        source=x_TK.data_ptr(),
        source_stride=x_TK.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )


def wide_gate(wide: Tensor, out: Tensor, rows: int, act: str) -> stages.Pointwise:
    """The stage of act(gate) · up for gates and ups side by side."""
    return stages.Pointwise(
        rows=rows,
        width=wide.shape[1] // 2,
        act=stages.ACTS[act],
        gated=True,
        x=wide.data_ptr(),
        x_stride=wide.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )


def embed_stage(
    step: stages.Step, w: Packed, out: Tensor, *, scale: float = 1.0, places: Tensor | None = None, offset: int = 0
) -> stages.QuantizedEmbed:
    """The stage that looks up the step's tokens in a table in panels, as `stages.Embed` does in a table of floats."""
    return stages.QuantizedEmbed(
        step=ctypes.pointer(step),
        table=panels_of(w),
        places=stages.numbers(places),
        width=w.k,
        offset=offset,
        scale=scale,
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )


def fits(w: Packed, x: Tensor | None = None) -> bool:
    """Whether the native product takes these: fp32 activations and contiguous panels in this machine's memory."""
    parts = [t for t in (w.codes, w.scales, w.zeros) if t is not None]
    here = all(t.device.type == "cpu" and t.is_contiguous() for t in parts)
    return here and (x is None or (x.device.type == "cpu" and x.dtype == torch.float32))


def product(x_TK: Tensor, w: Packed, b_N: Tensor | None = None, *, act: str = "none", gated: bool = False) -> Tensor:
    """act(x Wᵀ + b) by the native kernels; `gated` as in `linear.product`."""
    x_TK = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
    b_N = None if b_N is None else b_N.contiguous()
    out = torch.empty(x_TK.shape[0], w.n // 2 if gated else w.n)
    rows, rounding = ctypes.c_int32(x_TK.shape[0]), Rounding(x_TK.shape[0])
    _run(stages_for(x_TK, w, b_N, out, ctypes.addressof(rows), rounding, act=act, gated=gated))
    return out


def rows_of(ids_T: Tensor, w: Packed) -> Tensor:
    """Rows of a table in panels, widened to fp32."""
    ids = ids_T.to(torch.int32).contiguous()
    out = torch.empty(len(ids), w.k)
    step = stages.Step(tokens=len(ids), ids=ids.data_ptr())
    _run([embed_stage(step, w, out)])
    return out


def can_round(w: Tensor, into: Packed) -> bool:
    """Whether `round_into` takes these."""
    here = w.device.type == "cpu" and w.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return here and fits(into) and not native.missing() and into.whole


def round_into(w_NK: Tensor, into: Packed) -> bool:
    """Round weights [..., N, K] to nearest, straight into panels, as `Format.quantize` chooses scales, zeros and codes.

    False where a weight is not finite; the panels are then of no use.
    """
    bad = ctypes.c_int32(0)
    many = into.codes.dim() > 4
    for index, w in enumerate(w_NK.flatten(0, -3) if many else [w_NK]):
        w = w if w.stride(-1) == 1 else w.contiguous()
        stage = RoundWeights(
            w=w.data_ptr(),
            w_stride=w.stride(0),
            n=into.n,
            k=into.k,
            type=stages.TYPES[w.dtype],
            out=panels_of(into.expert(index) if many else into),
            bad=ctypes.addressof(bad),
        )
        _run([stage])
    return not bad.value


def _run(made: list[ctypes.Structure]) -> None:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    library.run(stages.program(*made), torch.get_num_threads())
