"""Linear layers by our product; those that read one input (queries, keys, values) are one product.

    q_proj(x) ──▶ x [W_q W_k W_v]ᵀ, kept ──▶ its part          one weight in memory, three names for its rows
    k_proj(x) ──▶ the same x: what is kept ──▶ its part
    v_proj(x) ──▶ the same x: what is kept ──▶ its part, and nothing is kept any longer

Shapes: [..., K] inputs, N outputs of a part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.linear import linear
from ...parallel.comm import added
from ...quant import QuantLinear, named

FEW = 4  # rows of fp32 that torch's product reads a weight for as fast as ours does, with less to prepare


class Product(nn.Module):
    """y = x Wᵀ + b in fp32 on the CPU, given back in the dtype of x. `group` adds up what the ranks made."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", weight)  # type: ignore[arg-type]
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        self.codes: QuantLinear | None = None
        self.group: torch.distributed.ProcessGroup | None = None

    @classmethod
    def of(cls, layer: nn.Linear) -> Product:
        return cls(layer.weight, layer.bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def rows(self) -> Tensor:
        """The weight, a row for each output."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.group is None else None
        y = multiply(x, self.rows, bias, self.codes)
        if self.group is None:
            return y
        y = added(y, self.group)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Transposed(Product):
    """A product whose weight is told as [in, out], as GPT-2's Conv1D is; in memory outputs are rows all the same."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        rows = weight.detach().t().contiguous()
        super().__init__(nn.Parameter(rows.t(), requires_grad=weight.requires_grad), bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1]

    @property
    def rows(self) -> Tensor:
        return self.weight.t()


def transposed(old: nn.Module) -> Transposed | None:
    """The product of a module that is transformers' Conv1D, None for any other."""
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    if type(old).__name__ != "Conv1D" or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return Transposed(weight, bias)


class Part(Product):
    """Some of the outputs of a product that several modules share."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: Shared) -> None:
        super().__init__(weight, bias)
        self._shared = (shared,)  # in a tuple, so that it is nobody's submodule

    def forward(self, x: Tensor) -> Tensor:
        return self._shared[0].part(self, x)


class Shared:
    """The product behind some Parts, whose weights are rows of one tensor; it is laid out anew when they were moved."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        self.parts = [Part(each.weight, each.bias, self) for each in parts]
        self.codes: QuantLinear | None = None
        self.join()

    @torch.no_grad()
    def join(self) -> None:
        """Lay the parts' weights into one tensor, and let their names be its rows."""
        self.forget()
        self.weight = torch.cat([part.weight.detach() for part in self.parts])
        biases = [part.bias.detach() for part in self.parts if part.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.places: dict[Part, slice] = {}
        at = 0
        for part in self.parts:
            self.places[part] = rows = slice(at, at + part.out_features)
            part.weight = nn.Parameter(self.weight[rows], requires_grad=part.weight.requires_grad)
            if self.bias is not None:
                part.bias = nn.Parameter(self.bias[rows], requires_grad=part.weight.requires_grad)
            at = rows.stop

    @property
    def moved(self) -> bool:
        """Whether somebody gave a part another weight, or moved the module elsewhere."""
        return any(part.weight.data_ptr() != self.weight[self.places[part]].data_ptr() for part in self.parts)

    def forget(self) -> None:
        self._kept: tuple[Tensor, int, Tensor] | None = None
        self._asked = 0

    def part(self, asking: Part, x: Tensor) -> Tensor:
        """The outputs of one part; the product is done when the first one asks, and kept until all have."""
        version = 0 if x.is_inference() else x._version
        if self._kept is None or self._kept[0] is not x or self._kept[1] != version:
            if self.codes is None and self.moved:
                self.join()
            self._kept, self._asked = (x, version, multiply(x, self.weight, self.bias, self.codes)), 0
        y = self._kept[2][..., self.places[asking]]
        self._asked += 1
        if self._asked == len(self.parts):
            self.forget()
        return y


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, codes: QuantLinear | None = None) -> Tensor:
    """x Wᵀ + b for any leading shape, in fp32, given back in the dtype of x; `codes` stand for the weight."""
    if codes is None and x.numel() <= FEW * x.shape[-1] and x.dtype == weight.dtype == torch.float32:
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1]).float()
    if codes is not None:
        y = codes(flat)
        y = y if bias is None else y + bias
    else:
        y = linear(flat, weight, None if bias is None else bias.float())
    out: Tensor = y.view(*x.shape[:-1], -1).to(x.dtype)
    return out


@torch.no_grad()
def rounded(weight: Tensor) -> QuantLinear:
    """A weight as int8 codes with a scale for each row; activations stay as they are."""
    return QuantLinear.of(named("int8-weight-only").quantize(weight.float()))
