"""Norms and activations joined to autograd by their own kernels: only the input is kept, and forward is done again.

Sums over rows are of runs of 32 rows, added up in order, so a repeated run has the same bits (`cpu/backward.cpp`).

Shapes: x [..., D], weights [D], or [H, D] where heads have their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native, stages

RUN = 32
KINDS = ("rms", "layer")


class NormGradient(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("groups", c_int32),
        ("width", c_int32),
        ("kind", c_int32),
        ("offset", c_int32),
        ("per_group", c_int32),
        ("eps", c_float),
        ("weight", stages.Numbers),
        ("x", c_void_p),
        ("dy", c_void_p),
        ("dx", c_void_p),
        ("sums", c_void_p),
    )


class SumRuns(Structure):
    _fields_ = (("runs", c_int32), ("width", c_int32), ("sums", c_void_p), ("out", c_void_p))


class ActivationGradient(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("act", c_int32),
        ("gated", c_int32),
        ("unused", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("dy", c_void_p),
        ("dx", c_void_p),
    )


def normed(
    run: Callable[[], Tensor], x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, *, kind: str, offset: bool
) -> Tensor:
    """What `run()` gives, a norm of x, with gradients for x, weight and bias."""
    wanted = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, w, b))
    if not wanted:
        return run()
    out: Tensor = _Normed.apply(run, x, w, b, eps, kind, offset)
    return out


def activated(run: Callable[[Tensor, str], Tensor], x: Tensor, act: str, *, gated: bool) -> Tensor:
    """run(x, act), an activation of x or a gated product of its halves, with the gradient for x."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return run(x, act)
    out: Tensor = _Activated.apply(run, x, act, gated)
    return out


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[], Tensor],
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        eps: float,
        kind: str,
        offset: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.eps, ctx.kind, ctx.offset = eps, KINDS.index(kind), offset
        ctx.bias = None if b is None else (b.shape, b.dtype)
        return run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        x, dy = x.detach().contiguous(), grads[0].contiguous()
        w = None if w is None else w.detach().contiguous()
        width = x.shape[-1]
        groups = w.shape[0] if w is not None and w.dim() == 2 else 1
        rows = ctypes.c_int32(x.numel() // max(1, width * groups))
        runs, weights = -(-rows.value // RUN), 2 * width * groups
        dx, sums, out = torch.empty_like(x), torch.empty(max(1, runs), weights), torch.empty(2, groups, width)
        slopes = NormGradient(
            rows=ctypes.addressof(rows),
            groups=groups,
            width=width,
            kind=ctx.kind,
            offset=ctx.offset,
            per_group=groups > 1,
            eps=ctx.eps,
            weight=stages.numbers(w),
            x=x.data_ptr(),
            dy=dy.data_ptr(),
            dx=dx.data_ptr(),
            sums=sums.data_ptr(),
        )
        _run([slopes, SumRuns(runs=runs, width=weights, sums=sums.data_ptr(), out=out.data_ptr())])
        needs = ctx.needs_input_grad
        dw = out[0].view(w.shape).to(w.dtype) if w is not None and needs[2] else None
        db = out[1].view(ctx.bias[0]).to(ctx.bias[1]) if ctx.bias and needs[3] else None
        return None, dx if needs[1] else None, dw, db, None, None, None


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor, str], Tensor], x: Tensor, act: str, gated: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.act, ctx.gated = act, gated
        return run(x, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        flat = x.detach().reshape(-1, x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        dy, dx = grads[0].contiguous(), torch.empty(x.shape)
        rows = ctypes.c_int32(flat.shape[0])
        slopes = ActivationGradient(
            rows=ctypes.addressof(rows),
            width=flat.shape[1] // 2 if ctx.gated else flat.shape[1],
            act=stages.ACTS[ctx.act],
            gated=ctx.gated,
            x=flat.data_ptr(),
            x_stride=flat.stride(0),
            dy=dy.data_ptr(),
            dx=dx.data_ptr(),
        )
        _run([slopes])
        return None, dx, None, None


def _run(program: list[Structure]) -> None:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    library.run(program, torch.get_num_threads())
