"""The decoder's tensors with a name of their own: a matrix or table, and the numbers of a norm.

Shapes: T tokens, R rows, V vocabulary, D hidden size, E embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.entropy import token_entropy
from ..kernels.linear import linear
from ..kernels.loss import token_logprobs
from ..kernels.norm import layer_norm, rms_norm
from ..kernels.quantized import Packed
from ..quant.linear import QuantLinear
from .spec import Head, Norm


class Weight(nn.Module):
    """A named tensor with an optional bias: [out, in] as a linear layer, [V, E] as a table, [D] as a norm's scale."""

    def __init__(self, *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(bias)) if bias else None
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return self.lora(x, y) if self.lora else y

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of a table."""
        return F.embedding(ids_T, self.weight)

    def floats(self) -> Tensor:
        """The weight as one can multiply by it."""
        return self.weight

    def logprobs(self, hidden_RD: Tensor, ids_R: Tensor, head: Head, keep: bool, temperature: float) -> Tensor:
        """log p [R] of one id for each row, this being the head."""
        how = head.multiplier, head.softcap, keep, temperature
        return token_logprobs(hidden_RD, self.weight, self.bias, ids_R, *how)

    def entropy(self, hidden_RD: Tensor, head: Head, temperature: float) -> Tensor:
        """Entropy [R] of what each row's scores say, this being the head."""
        return token_entropy(hidden_RD, self.weight, self.bias, head.multiplier, head.softcap, temperature)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


class Normalise(nn.Module):
    """A Norm over the last dimension, weights of `shape`."""

    def __init__(self, spec: Norm, *shape: int) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.weight = nn.Parameter(torch.empty(shape)) if spec.weight else None
        self.bias = nn.Parameter(torch.empty(shape)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "rms":
            return rms_norm(x, self.weight, self.spec.eps, self.spec.offset)
        return layer_norm(x, self.weight, self.bias, self.spec.eps)


def each_expert(module: Weight | QuantLinear) -> Sequence[Tensor] | Sequence[Packed]:
    """A stack of experts' weights, one by one."""
    if isinstance(module, QuantLinear):
        packed = module.packed
        return [packed.expert(i) for i in range(len(packed.codes))]
    return module.weight.detach().unbind()
