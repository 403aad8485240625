"""Mixture of experts: each token goes through its own few feed-forwards, added in expert order.

Natively one call: tokens are dealt to their experts, each expert's rows are multiplied together (the grouped products
of MegaBlocks, Gale et al. 2022), and a token's bits are those of going alone.

Shapes: T tokens, D hidden, E experts, F expert width, C experts chosen for a token, P places (T x C).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import ConfigError
from . import grouped_stages, native, panels
from .activation import gated
from .gradient import with_reference_gradient
from .grouped import Matrices, Places, choices_of, in_lines, present, run
from .linear import fits, linear
from .op import op
from .panels import Rounding
from .quantized import Packed, quantized_experts


@op
def route(logits_TE: Tensor, top_k: int, renormalise: bool, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the `top_k` best and their weights: (weights [T, C] fp32, experts [T, C]).

    Best first; of equals the lower expert is the better. A `bias_E` (fp32) is added to the probabilities for the choice
    alone, never to a weight (the balance without a loss of Wang et al. 2024 and DeepSeek-V3).
    """
    _check(top_k, logits_TE.shape[1])
    logits_TE = logits_TE.float()
    merit_TE = logits_TE if bias_E is None else torch.softmax(logits_TE, -1) + bias_E
    experts_TC = torch.sort(merit_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    return weights_of(logits_TE, experts_TC, renormalise), experts_TC


def weights_of(logits_TE: Tensor, experts_TC: Tensor, renormalise: bool) -> Tensor:
    """The weights [T, C] of experts that are chosen already."""
    weights_TC = torch.softmax(logits_TE.float(), -1).gather(-1, experts_TC)
    return weights_TC / weights_TC.sum(-1, keepdim=True) if renormalise else weights_TC


@op
def experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    """The weighted sum of each token's experts, added in the order of the experts.

    A negative choice is none: a pair that was dropped, or an expert that lives elsewhere.
    """
    out_TD = torch.zeros_like(x_TD)
    for expert in present(experts_TC):
        token, choice = torch.where(experts_TC == expert)
        hidden = gated(linear(x_TD[token], gate_up_E2FD[expert]), act)
        share = linear(hidden, down_EDF[expert]) * weights_TC[token, choice, None].to(x_TD.dtype)
        out_TD = out_TD.index_add(0, token, share)
    return out_TD


@op
def open_gate(out_TD: Tensor, y_TD: Tensor, gate_T1: Tensor) -> Tensor:
    """out + sigmoid(gate) · y: what a mixture's shared expert adds."""
    return out_TD + y_TD / (1.0 + torch.exp(-gate_T1))


# ----------------------------------------------------------------------------------------------------- native
@route.on("native", why="one pass over a row, sums in sixteen lanes and one tree", missing=native.missing, bits="own")
def _route(logits_TE: Tensor, top_k: int, renormalise: bool, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if logits_TE.device.type != "cpu":
        return route.reference(logits_TE, top_k, renormalise, bias_E)
    _check(top_k, logits_TE.shape[1])
    weights_TC, chosen_TC = _Route.apply(logits_TE, top_k, renormalise, bias_E)
    return weights_TC, chosen_TC


@experts.on("native", why="every expert's rows in one call, read where they lie", missing=native.missing)
def _experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    if not (fits(x_TD, gate_up_E2FD) and fits(x_TD, down_EDF)):
        return experts.reference(x_TD, gate_up_E2FD, down_EDF, weights_TC, experts_TC, act)
    out: Tensor = _Experts.apply(x_TD, gate_up_E2FD, down_EDF, weights_TC, experts_TC, act)
    return out


@quantized_experts.on("native", why="every expert's rows in one call, from panels as they lie", missing=native.missing)
def _quantized_experts(
    x_TD: Tensor, gate_up: Packed, down: Packed, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    if not (panels.fits(gate_up, x_TD) and panels.fits(down)):
        return quantized_experts.reference(x_TD, gate_up, down, weights_TC, experts_TC, act)
    count = len(gate_up.codes)
    inner = Matrices([gate_up.expert(i) for i in range(count)], gated=True)
    outer = Matrices([down.expert(i) for i in range(count)])
    mixing = Mixing(len(experts_TC), count, experts_TC.shape[1], down.k, down.n)
    return mixing.run(x_TD, inner, outer, weights_TC, experts_TC, act)


@open_gate.on("native", why="one pass, by our own exp", missing=native.missing, bits="own")
def _open_gate(out_TD: Tensor, y_TD: Tensor, gate_T1: Tensor) -> Tensor:
    if not all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (out_TD, y_TD, gate_T1)):
        return open_gate.reference(out_TD, y_TD, gate_T1)
    return with_reference_gradient(_open_gate_forward, open_gate.reference, out_TD, y_TD, gate_T1)


class Mixing:
    """What the stages of one mixture work in, for at most `tokens` tokens: of `top_k` of `experts` of width F."""

    def __init__(self, tokens: int, experts: int, top_k: int, width: int, hidden: int) -> None:
        self.places = Places(tokens, top_k, experts)
        self.weights_TC = torch.empty(tokens, top_k)
        self.chosen_TC = torch.empty(tokens, top_k, dtype=torch.int32)
        self.inner_PF = torch.empty(tokens * top_k, width)
        self.outer_PD = torch.empty(tokens * top_k, hidden)
        self._rounding = Rounding(tokens * top_k)

    def stages_of(
        self, x_TD: Tensor, gate_up: Matrices, down: Matrices, out_TD: Tensor, act: str, rows: int
    ) -> list[ctypes.Structure]:
        """The stages from tokens, and the experts in `chosen_TC` with their weights, to `out_TD`."""
        count = self.places.count
        return [
            self.places.deal(self.chosen_TC, rows),
            *gate_up.stages_of(self.places, x_TD, self.inner_PF, rows, self._rounding, act=act, gather=True),
            *down.stages_of(self.places, self.inner_PF, self.outer_PD, count, self._rounding),
            grouped_stages.Combine(
                rows=rows,
                choices=self.places.choices,
                width=out_TD.shape[1],
                places=self.places.places_TC.data_ptr(),
                pair=self.places.pair_P.data_ptr(),
                weights=self.weights_TC.data_ptr(),
                y=self.outer_PD.data_ptr(),
                y_stride=self.outer_PD.stride(0),
                out=out_TD.data_ptr(),
                out_stride=out_TD.stride(0),
            ),
        ]

    def run(self, x_TD: Tensor, gate_up: Matrices, down: Matrices, weights: Tensor, chosen: Tensor, act: str) -> Tensor:
        """One mixture here and now: [T, D]."""
        x_TD, rows = in_lines(x_TD), ctypes.c_int32(len(x_TD))
        self.weights_TC = weights.float().contiguous()
        self.chosen_TC = choices_of(chosen, self.places.groups, "experts", least=-1)
        out_TD = torch.empty(len(x_TD), self.outer_PD.shape[1])
        run(*self.stages_of(x_TD, gate_up, down, out_TD, act, ctypes.addressof(rows)))
        return out_TD


def route_stage(
    logits_TE: Tensor,
    renormalise: bool,
    weights_TC: Tensor,
    chosen_TC: Tensor,
    rows: int,
    bias_E: Tensor | None = None,
) -> grouped_stages.Route:
    """The stage of `route`; `rows` is the address of the row count, read when the stage runs. `bias_E` is fp32."""
    return grouped_stages.Route(
        rows=rows,
        experts=logits_TE.shape[1],
        top_k=chosen_TC.shape[1],
        renormalise=renormalise,
        logits=logits_TE.data_ptr(),
        logits_stride=logits_TE.stride(0),
        bias=None if bias_E is None else bias_E.data_ptr(),
        weights=weights_TC.data_ptr(),
        chosen=chosen_TC.data_ptr(),
    )


def gate_stage(x_TD: Tensor, y_TD: Tensor, gate_T1: Tensor, out_TD: Tensor, rows: int) -> grouped_stages.Gate:
    """The stage of `open_gate`; `out_TD` may be `x_TD`."""
    return grouped_stages.Gate(
        rows=rows,
        width=x_TD.shape[1],
        gate=gate_T1.data_ptr(),
        gate_stride=gate_T1.stride(0),
        x=x_TD.data_ptr(),
        x_stride=x_TD.stride(0),
        y=y_TD.data_ptr(),
        y_stride=y_TD.stride(0),
        out=out_TD.data_ptr(),
        out_stride=out_TD.stride(0),
    )


def _open_gate_forward(x_TD: Tensor, y_TD: Tensor, gate_T1: Tensor) -> Tensor:
    x_TD, y_TD, out_TD = in_lines(x_TD), in_lines(y_TD), torch.empty(x_TD.shape)
    rows = ctypes.c_int32(len(x_TD))
    run(gate_stage(x_TD, y_TD, gate_T1, out_TD, ctypes.addressof(rows)))
    return out_TD


def _check(top_k: int, experts: int) -> None:
    if not 1 <= top_k <= experts:
        raise ConfigError(f"{top_k} experts for each token, of {experts}: choose from 1 to {experts}")


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, top_k: int, renormalise: bool, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits_TE = in_lines(logits_TE.float())
        bias_E = None if bias_E is None else bias_E.float().contiguous()
        weights_TC = torch.empty(len(logits_TE), top_k)
        chosen_TC = torch.empty(len(logits_TE), top_k, dtype=torch.int32)
        rows = ctypes.c_int32(len(logits_TE))
        run(route_stage(logits_TE, renormalise, weights_TC, chosen_TC, ctypes.addressof(rows), bias_E))
        experts_TC = chosen_TC.long()
        ctx.save_for_backward(logits_TE, experts_TC)
        ctx.renormalise = renormalise
        ctx.mark_non_differentiable(experts_TC)
        return weights_TC, experts_TC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TE, experts_TC = ctx.saved_tensors
        logits_TE = logits_TE.detach().requires_grad_()
        with torch.enable_grad():
            weights_TC = weights_of(logits_TE, experts_TC, ctx.renormalise)
            (grad_TE,) = torch.autograd.grad(weights_TC, logits_TE, grads[0])
        return grad_TE, None, None, None


class _Experts(torch.autograd.Function):
    """Forward in one call; backward expert by expert, from the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        weights_TC: Tensor,
        experts_TC: Tensor,
        act: str,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, gate_up_E2FD, down_EDF, weights_TC, experts_TC)
        ctx.act = act
        (tokens, top_k), (count, hidden, width) = experts_TC.shape, down_EDF.shape
        gate_up, down = Matrices(gate_up_E2FD.unbind(), gated=True), Matrices(down_EDF.unbind())
        mixing = Mixing(tokens, count, top_k, width, hidden)
        return mixing.run(x_TD, gate_up, down, weights_TC, experts_TC, act)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_E2FD, down_EDF, weights_TC, experts_TC = ctx.saved_tensors
        grad_TD = grads[0]
        found = [torch.zeros_like(x) for x in (x_TD, gate_up_E2FD, down_EDF, weights_TC)]
        for expert in present(experts_TC):
            token, choice = torch.where(experts_TC == expert)
            pieces = [x_TD[token], gate_up_E2FD[expert], down_EDF[expert], weights_TC[token, choice]]
            x, gate_up, down, weights = (piece.detach().float().requires_grad_() for piece in pieces)
            with torch.enable_grad():
                y = F.linear(gated(F.linear(x, gate_up), ctx.act), down) * weights[:, None]
            x_grad, *weight_grads, share = torch.autograd.grad(y, (x, gate_up, down, weights), grad_TD[token])
            found[0].index_add_(0, token, x_grad)
            for whole, grad in zip(found[1:3], weight_grads):
                whole[expert] = grad
            found[3][token, choice] = share.to(weights_TC.dtype)
        return (*(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad)), None, None)
