"""Low-rank adapters in a batch where each token may have its own.

    x [T, K] ── shrink by A of the token's adapter ──▶ [P, R] ── expand by B, scaled ──▶ added to y [T, N]

Tokens are grouped by adapter, each group multiplied by its own A and B whatever their ranks; a token's bits are those
of going alone, and a token without an adapter is not touched. LoRA: Hu et al. 2021; SGMV: Punica, Chen et al. 2023.

Shapes: T tokens, K inputs, N outputs, R an adapter's rank, P tokens that have an adapter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import ConfigError
from . import native
from .grouped import Matrices, Places, choices_of, in_lines, run
from .linear import fits, linear
from .op import op
from .panels import Rounding


class Adapter(NamedTuple):
    """x goes to scale · B (A x): A [R, K], B [N, R], fp32 or bf16."""

    a_RK: Tensor
    b_NR: Tensor
    scale: float = 1.0


@op
def lora(x_TK: Tensor, y_TN: Tensor, adapters: Sequence[Adapter], index_T: Tensor) -> Tensor:
    """y with each token's adapter added: y + scale · B (A x), where `index_T` names the adapter, -1 for none.

    The result is `y_TN` itself where no token has one.
    """
    for number, (a_RK, b_NR, scale) in enumerate(adapters):
        token = torch.where(index_T == number)[0]
        if len(token):
            y_TN = y_TN.index_add(0, token, linear(linear(x_TK[token], a_RK), b_NR) * scale)
    return y_TN


@lora.on("native", why="all adapters of a batch in one call, each at its own rank", missing=native.missing)
def _native(x_TK: Tensor, y_TN: Tensor, adapters: Sequence[Adapter], index_T: Tensor) -> Tensor:
    if not all(fits(x_TK, w) and fits(y_TN, w) for adapter in adapters for w in adapter[:2]):
        return lora.reference(x_TK, y_TN, adapters, index_T)
    if not len(index_T) or int(index_T.max()) < 0:
        return y_TN
    weights = [w for adapter in adapters for w in adapter[:2]]
    out: Tensor = _Lora.apply(x_TK, y_TN, index_T, tuple(adapter.scale for adapter in adapters), *weights)
    return out


class Adapting:
    """What the stages of a batch of adapters work in, for at most `tokens` tokens; keeps the adapters' weights alive.

    Adapters are those of one layer's product; all share K and N.

    Raises:
        ConfigError: adapters whose shapes do not go together.
    """

    def __init__(self, adapters: Sequence[Adapter], tokens: int) -> None:
        shapes = {(a.shape[1], b.shape[0]) for a, b, _ in adapters}
        if len(shapes) != 1 or any(a.shape[0] != b.shape[1] for a, b, _ in adapters):
            given = ", ".join(f"{list(a.shape)} and {list(b.shape)}" for a, b, _ in adapters) or "none"
            raise ConfigError(
                f"adapters of one product are A [rank, {{K}}] and B [{{N}}, rank] alike in K and N: {given}"
            )
        self.places = Places(tokens, 1, len(adapters))
        self.index_T = torch.empty(tokens, dtype=torch.int32)
        self.shrunk_PR = torch.empty(tokens, max(1, *(len(adapter.a_RK) for adapter in adapters)))
        self._rounding = Rounding(tokens)
        self._shrink = Matrices([adapter.a_RK for adapter in adapters])
        self._expand = Matrices([adapter.b_NR for adapter in adapters], scales=[adapter.scale for adapter in adapters])

    def stages_of(self, x_TK: Tensor, y_TN: Tensor, rows: int) -> list[ctypes.Structure]:
        """The stages that add to `y_TN`, in place, what the adapters named in `index_T` make of `x_TK`."""
        return [
            self.places.deal(self.index_T, rows),
            *self._shrink.stages_of(self.places, x_TK, self.shrunk_PR, rows, self._rounding, gather=True),
            *self._expand.stages_of(self.places, self.shrunk_PR, y_TN, self.places.count, self._rounding, scatter=True),
        ]


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, y_TN: Tensor, index_T: Tensor, scales: tuple[float, ...], *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TK, index_T, *weights)
        ctx.scales = scales
        adapters = [Adapter(*three) for three in zip(weights[::2], weights[1::2], scales, strict=True)]
        adapting, out_TN = Adapting(adapters, len(x_TK)), y_TN.clone(memory_format=torch.contiguous_format)
        adapting.index_T = choices_of(index_T, len(adapters), "adapters", least=-1)
        rows = ctypes.c_int32(len(x_TK))
        run(*adapting.stages_of(in_lines(x_TK), out_TN, ctypes.addressof(rows)))
        return out_TN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, index_T, *weights = ctx.saved_tensors
        grad_TN, grad_x_TK, found = grads[0], torch.zeros_like(x_TK), []
        for number, scale in enumerate(ctx.scales):
            a_RK, b_NR = weights[2 * number : 2 * number + 2]
            token = torch.where(index_T == number)[0]
            x, grad = x_TK[token], grad_TN[token] * scale
            shrunk, inner = x @ a_RK.float().t(), grad @ b_NR.float()
            found += [(inner.t() @ x).to(a_RK.dtype), (grad.t() @ shrunk).to(b_NR.dtype)]
            grad_x_TK.index_add_(0, token, inner @ a_RK.float())
        every = (grad_x_TK, grad_TN, None, None, *found)
        return tuple(grad if needed else None for grad, needed in zip(every, ctx.needs_input_grad, strict=True))
