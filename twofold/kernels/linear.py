"""Linear layers whose rows have one bit pattern, in training and in serving.

Activations and results are fp32 on the CPU whatever the weights are kept in; bf16 weights are widened exactly, and so
are those in fp16, a whole weight at a time.

Shapes: T tokens, K inputs, N outputs, F outputs of a gated product (2F rows of weights).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, stages
from .op import op
from .rows import by_rows, by_tiles
from .slopes import input_slopes, weight_slopes

WIDTH = 16


@op
def linear(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, a tile of rows at a time: the definition of the ways that use torch's products."""
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, w_NK.shape[0])
    y_TN = by_tiles(x_TK, _wide(w_NK.to(x_TK.dtype)).t())[:, : w_NK.shape[0]]
    return y_TN if b_N is None else y_TN + b_N


@linear.on(
    "native",
    why="weights as they lie, fp32 or bf16; one accumulator for each output, so bits do not depend on rows or threads",
    missing=native.missing,
    bits="own",
)
def _native(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    if not (fits(x_TK, w_NK) or (w_NK.dtype == torch.float16 and fits(x_TK, x_TK))):
        return _rows(x_TK, w_NK, b_N)
    if torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad):
        out: Tensor = _Linear.apply(x_TK, w_NK, b_N, product)
        return out
    return product(x_TK, w_NK, b_N)


@linear.on("rows", why="as many rows at a time as this machine was measured to give the definition's bits for")
def _rows(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad):
        out: Tensor = _Linear.apply(x_TK, w_NK, b_N, _by_rows)
        return out
    return _by_rows(x_TK, w_NK, b_N)


def fits(x: Tensor, w: Tensor) -> bool:
    """Whether the native product takes these: fp32 activations and fp32 or bf16 weights, in this machine's memory."""
    return x.dtype == torch.float32 and w.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu"


def product(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None, *, act: str = "none", gated: bool = False) -> Tensor:
    """act(x Wᵀ + b) by the native kernel; `gated`: weights [2F, K], gates first, give act(gate) · up [T, F]."""
    library = native.library()
    assert library is not None, "asked for only where it is there"
    w_NK, b_N = _known(w_NK), None if b_N is None else _known(b_N)
    x_TK = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
    w_NK = w_NK if w_NK.stride(-1) == 1 else w_NK.contiguous()
    b_N = None if b_N is None else b_N.contiguous()
    outputs = w_NK.shape[0] // 2 if gated else w_NK.shape[0]
    out = torch.empty(x_TK.shape[0], outputs)
    rows = ctypes.c_int32(x_TK.shape[0])
    stage = stage_of(x_TK, w_NK, b_N, out, ctypes.addressof(rows), act=act, gated=gated)
    library.run(stages.program(stage), torch.get_num_threads())
    return out


def stage_of(
    x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None, out: Tensor, rows: int, *, act: str = "none", gated: bool = False
) -> stages.Linear:
    """The stage of one product; `rows` is the address of the row count, read when the stage runs."""
    return stages.Linear(
        rows=rows,
        n=w_NK.shape[0] // 2 if gated else w_NK.shape[0],
        k=w_NK.shape[1],
        type=stages.TYPES[w_NK.dtype],
        act=stages.ACTS[act],
        gated=gated,
        w=w_NK.data_ptr(),
        w_stride=w_NK.stride(0),
        bias=stages.numbers(b_N),
        a=x_TK.data_ptr(),
        a_stride=x_TK.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )


def _known(w: Tensor) -> Tensor:
    """In a type that the native product reads."""
    return w.float() if w.dtype == torch.float16 else w


def _wide(w_NK: Tensor) -> Tensor:
    """At least WIDTH outputs: for fewer a library may take a path whose bits depend on the row's place."""
    return w_NK if w_NK.shape[0] >= WIDTH else F.pad(w_NK, (0, 0, 0, WIDTH - w_NK.shape[0]))


def _by_rows(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, w_NK.shape[0])
    y_TN = by_rows(x_TK.contiguous(), _wide(w_NK.to(x_TK.dtype)).t())[:, : w_NK.shape[0]]
    return y_TN if b_N is None else y_TN.add_(b_N)


class _Linear(torch.autograd.Function):
    """The same forward with the usual gradients; backward is free of the contract but not of determinism."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None, forward: Any) -> Tensor:
        ctx.save_for_backward(x_TK, w_NK)
        ctx.bias = None if b_N is None else b_N.dtype
        out: Tensor = forward(x_TK, w_NK, b_N)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_TN,) = grads
        x_TK, w_NK = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = input_slopes(grad_TN, w_NK) if needs[0] else None
        grad_w = weight_slopes(grad_TN, x_TK).to(w_NK.dtype) if needs[1] else None
        grad_b = grad_TN.sum(0).to(ctx.bias) if ctx.bias and needs[2] else None
        return grad_x, grad_w, grad_b, None
