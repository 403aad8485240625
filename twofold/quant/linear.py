"""QuantLinear: a linear layer, a table of rows or a stack of experts whose weight is kept in panels of codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import panels
from ..kernels.quantized import Packed, quantized_linear, quantized_rows
from ..kernels.slopes import input_slopes
from .codes import Quantized
from .format import Format


class QuantLinear(nn.Module):
    """Stands where a float weight stood: [out, in] as a linear layer, [V, E] as a table, [experts, out, in].

    With an `order`, groups are of inputs in that order, and a row's numbers are taken in it (GPTQ's desc_act).

    The bias stays a parameter, and is frozen as the weight is: a gradient goes through to the input alone, as if
    activations had not been rounded (QLoRA, Dettmers et al. 2023). Moving it moves the panels, whose
    dtypes never change.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    order: Tensor | None

    def __init__(
        self, packed: Packed, format: Format, bias: nn.Parameter | None = None, order: Tensor | None = None
    ) -> None:
        super().__init__()
        self.format = format
        self.n, self.k = packed.n, packed.k
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.register_buffer("order", order)
        self.bias = bias
        self.lora: nn.Module | None = None

    @classmethod
    def of(cls, quantized: Quantized, bias: nn.Parameter | None = None) -> QuantLinear:
        return cls(quantized.pack(), quantized.format, bias, quantized.order)

    @property
    def packed(self) -> Packed:
        """The weight as the kernels read it."""
        return Packed(self.codes, self.scales, self.zeros, self.n, self.k, self.format.group, self.format.dynamic)

    @property
    def quantized(self) -> Quantized:
        """The weight as numbers one can read; a copy."""
        return replace(self.format.unpack(self.packed), order=self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, without what is filled up."""
        return (*self.codes.shape[:-4], self.n, self.k)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def put(self, quantized: Quantized) -> None:
        """Other codes of the same shape and format, in place."""
        packed = quantized.pack()
        self.codes.copy_(packed.codes)
        self.scales.copy_(packed.scales)
        if self.zeros is not None and packed.zeros is not None:
            self.zeros.copy_(packed.zeros)
        if self.order is not None and quantized.order is not None:
            self.order.copy_(quantized.order)

    def round(self, w_NK: Tensor) -> None:
        """Float weights of the same shape, rounded to nearest, in place.

        Raises:
            ConfigError: weights that are not finite.
        """
        packed = self.packed
        if self.order is not None:
            w_NK = w_NK[..., self.order]
        if self.format.tensor or not (panels.can_round(w_NK, packed) and panels.round_into(w_NK, packed)):
            self.put(self.format.quantize(w_NK))

    def forward(self, x_TK: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x_TK.requires_grad:
            y_TN: Tensor = _Frozen.apply(x_TK, self)
        else:
            y_TN = quantized_linear(self.ordered(x_TK), self.packed, self.bias)
        return y_TN if self.lora is None else self.lora(x_TK, y_TN)

    def ordered(self, x_TK: Tensor) -> Tensor:
        """Inputs in the order of the panels' groups."""
        return x_TK if self.order is None else x_TK[:, self.order]

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of a table, fp32."""
        return quantized_rows(ids_T, self.packed)

    def floats(self) -> Tensor:
        """The weight that the codes stand for, fp32; a copy."""
        return self.quantized.dequantize()

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, {self.format.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in ("codes", "scales", "zeros")}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            if kept is not None and getattr(self, name).dtype != kept.dtype:
                setattr(self, name, kept.to(self.scales.device))
        return self


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, module: QuantLinear) -> Tensor:
        ctx.module = module
        return quantized_linear(module.ordered(x_TK), module.packed, module.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return input_slopes(grads[0], ctx.module.floats()), None
