"""Activations with the same bits wherever a number lies in memory.

torch's silu, sigmoid and gelu differ between the vectorized body and the scalar tail of a loop, or between strided and
contiguous memory; exp, tanh and erf of contiguous numbers do not, so the formulas are spelled out in those.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, stages
from .backward import activated
from .gradient import with_reference_gradient
from .op import op


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _gelu_quick(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-1.702 * x))


def _relu2(x: Tensor) -> Tensor:
    y = torch.relu(x)
    return y * y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": _gelu_quick,
    "relu": torch.relu,
    "relu2": _relu2,
}


def scaled(scores_RV: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """A head's scores as logits: times `multiplier`, then softcap · tanh(scores / softcap)."""
    if multiplier != 1.0:
        scores_RV = scores_RV * multiplier
    return scores_RV if softcap is None else soft_cap(scores_RV, softcap)


@op
def activate(x: Tensor, act: str) -> Tensor:
    """One of ACTIVATIONS, computed in fp32 and rounded to x's dtype."""
    return ACTIVATIONS[act](x.float()).to(x.dtype)


@op
def gated(gate_up_TF: Tensor, act: str) -> Tensor:
    """act(gate) · up for a [T, 2F] whose first half is the gate: [T, F]."""
    gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
    return (ACTIVATIONS[act](gate_TF.contiguous()) * up_TF).to(gate_up_TF.dtype)


@op
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap), which keeps scores within ±cap (Gemma 2): fp32 [R, V]."""
    return cap * torch.tanh(x / cap)


@soft_cap.on("native", why="one pass, by our own tanh", missing=native.missing, bits="own")
def _soft_cap(x: Tensor, cap: float) -> Tensor:
    if not _fits(x):
        return soft_cap.reference(x, cap)
    return with_reference_gradient(_soft_cap_forward, soft_cap.reference, x, cap)


@activate.on("native", why="one pass, by our own exp, tanh and erf", missing=native.missing, bits="own")
def _activate(x: Tensor, act: str) -> Tensor:
    if not _fits(x):
        return activate.reference(x, act)
    return activated(_activate_forward, x, act, gated=False)


@gated.on("native", why="one pass; backward keeps the input alone", missing=native.missing, bits="own")
def _gated_native(gate_up_TF: Tensor, act: str) -> Tensor:
    if not _fits(gate_up_TF):
        return _gated(gate_up_TF, act)
    return activated(_gated_forward, gate_up_TF, act, gated=True)


@gated.on("silu", why="the same forward; a backward that keeps one tensor instead of six")
def _gated(gate_up_TF: Tensor, act: str) -> Tensor:
    if act == "silu" and torch.is_grad_enabled() and gate_up_TF.requires_grad:
        out: Tensor = _SwiGlu.apply(gate_up_TF, gated.reference)
        return out
    return gated.reference(gate_up_TF, act)


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() > 0


def _activate_forward(x: Tensor, act: str) -> Tensor:
    return _pointwise(x.reshape(-1, x.shape[-1]), x.shape[-1], act, is_gated=False).view(x.shape)


def _gated_forward(gate_up_TF: Tensor, act: str) -> Tensor:
    return _pointwise(gate_up_TF, gate_up_TF.shape[-1] // 2, act, is_gated=True)


def _soft_cap_forward(x: Tensor, cap: float) -> Tensor:
    return _pointwise(x.reshape(-1, x.shape[-1]), x.shape[-1], "none", is_gated=False, cap=cap).view(x.shape)


def _pointwise(x_TF: Tensor, width: int, act: str, *, is_gated: bool, cap: float = 0.0) -> Tensor:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    x_TF = x_TF if x_TF.stride(-1) == 1 else x_TF.contiguous()
    out = torch.empty(x_TF.shape[0], width)
    rows = ctypes.c_int32(x_TF.shape[0])
    stage = stages.Pointwise(
        rows=ctypes.addressof(rows),
        width=width,
        act=stages.ACTS[act],
        gated=is_gated,
        softcap=cap,
        x=x_TF.data_ptr(),
        x_stride=x_TF.stride(0),
        out=out.data_ptr(),
        out_stride=width,
    )
    library.run(stages.program(stage), torch.get_num_threads())
    return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor, forward: Callable[[Tensor, str], Tensor]) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        return forward(gate_up_TF, "silu")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_TF,) = grads
        (gate_up_TF,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
        out_TF = torch.empty(gate_up_TF.shape, dtype=torch.float32, device=gate_up_TF.device)
        d_gate_TF, d_up_TF = out_TF.chunk(2, -1)
        grad_TF = grad_TF.float()
        torch.mul(grad_TF, F.silu(gate_TF), out=d_up_TF)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up_TF, gate_TF, grad_input=d_gate_TF)
        return out_TF.to(gate_up_TF.dtype), None
