"""Activations with the same bits wherever a number lies in memory.

torch's silu, sigmoid and gelu differ between the vectorized body and the scalar tail of a loop, or between strided and
contiguous memory; exp, tanh and erf of contiguous numbers do not, so the formulas are spelled out in those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


@op
def activate(x: Tensor, act: str) -> Tensor:
    """One of ACTIVATIONS, computed in fp32 and rounded to x's dtype."""
    return ACTIVATIONS[act](x.float()).to(x.dtype)


@op
def gated(gate_up_TF: Tensor, act: str) -> Tensor:
    """act(gate) · up for a [T, 2F] whose first half is the gate: [T, F]."""
    gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
    return (ACTIVATIONS[act](gate_TF.contiguous()) * up_TF).to(gate_up_TF.dtype)


@gated.on("silu", why="the same forward; a backward that keeps one tensor instead of six")
def _gated(gate_up_TF: Tensor, act: str) -> Tensor:
    if act == "silu" and torch.is_grad_enabled() and gate_up_TF.requires_grad:
        out: Tensor = _SwiGlu.apply(gate_up_TF)
        return out
    return gated.reference(gate_up_TF, act)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_TF)
        gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
        y_TF = gate_TF.neg().exp_().add_(1.0)  # the reference's operations, without a new tensor for each
        return torch.div(gate_TF, y_TF, out=y_TF).mul_(up_TF).to(gate_up_TF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad_TF,) = grads
        (gate_up_TF,) = ctx.saved_tensors
        gate_TF, up_TF = gate_up_TF.float().chunk(2, -1)
        out_TF = torch.empty(gate_up_TF.shape, dtype=torch.float32, device=gate_up_TF.device)
        d_gate_TF, d_up_TF = out_TF.chunk(2, -1)
        grad_TF = grad_TF.float()
        torch.mul(grad_TF, F.silu(gate_TF), out=d_up_TF)
        torch.ops.aten.silu_backward.grad_input(grad_TF * up_TF, gate_TF, grad_input=d_gate_TF)
        return out_TF.to(gate_up_TF.dtype)
