"""Norms and gated feed-forwards by our kernels, under the names that the module had.

Shapes: [..., D] hidden states, F width of the feed-forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.activation import ACTIVATIONS, activate, gated
from ...kernels.norm import layer_norm, rms_norm
from .joined import FEW, Product, Shared, multiply
from .proof import apart

_NORM = re.compile(r"(RMSNorm|LayerNorm|Norm)$")
_EPS = ("variance_epsilon", "eps", "epsilon")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def few(x: Tensor) -> bool:
    """Whether these are so few rows of fp32 that waking a team of threads costs more than their work."""
    return x.numel() <= FEW * x.shape[-1] and x.dtype == torch.float32


class Norm(nn.Module):
    """rms_norm (`offset`: times 1 + w, as Gemma's) or layer_norm."""

    def __init__(self, old: nn.Module, eps: float, kind: str, offset: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = getattr(old, "weight", None)
        self.bias: nn.Parameter | None = getattr(old, "bias", None)
        self.eps, self.kind, self.offset = eps, kind, offset

    @property
    def width(self) -> int:
        assert self.weight is not None
        return self.weight.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        if few(x):
            weight = self.weight + 1.0 if self.offset and self.weight is not None else self.weight
            if self.kind == "rms":
                return F.rms_norm(x, x.shape[-1:], weight, self.eps)
            return F.layer_norm(x, x.shape[-1:], weight, self.bias, self.eps)
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps, self.offset)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.kind}, eps={self.eps}{', 1 + weight' if self.offset else ''}"


def norms(old: nn.Module) -> Iterator[Norm]:
    """What a module that is called a norm may be, to be tried one after another; nothing when it is none."""
    weight = getattr(old, "weight", None)
    eps = next((float(getattr(old, name)) for name in _EPS if isinstance(getattr(old, name, None), float)), None)
    if not _NORM.search(type(old).__name__) or eps is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return
    yield Norm(old, eps, "rms")
    yield Norm(old, eps, "rms", offset=True)
    yield Norm(old, eps, "layer")


class GatedFeedForward(nn.Module):
    """down(act(gate x) · (up x)), gate and up one product; its layers keep their names."""

    def __init__(self, names: tuple[str, str, str], layers: tuple[nn.Linear, nn.Linear, nn.Linear], act: str) -> None:
        super().__init__()
        gate, up, down = layers
        self.shared, self.act, self.names = Shared([gate, up]), act, names
        for name, part in zip(names[:2], self.shared.parts, strict=True):
            self.add_module(name, part)
        self.add_module(names[2], Product.of(down))

    @property
    def down(self) -> Product:
        found = getattr(self, self.names[2])
        assert isinstance(found, Product)
        return found

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared
        if shared.codes is None and shared.moved:
            shared.join()
        both = multiply(x, shared.weight, shared.bias, shared.codes)
        if few(x) and self.act in ACTS:
            gate, up = both.chunk(2, -1)
            inner = ACTS[self.act](gate) * up
        else:
            inner = gated(both.reshape(-1, both.shape[-1]), self.act).view(*x.shape[:-1], -1)
        out: Tensor = self.down(inner)
        return out

    def extra_repr(self) -> str:
        return f"act={self.act}"


def feed_forward(old: nn.Module) -> GatedFeedForward | None:
    """A gated feed-forward of three linear layers and an activation that we have; None for anything else."""
    children = dict(old.named_children())
    for names in _GATED:
        layers = tuple(children.get(name) for name in names)
        if all(type(layer) is nn.Linear for layer in layers):
            gate, up, down = layers
            others = [child for name, child in children.items() if name not in names]
            act = activation(next((child for child in others if not list(child.parameters())), None), old)
            same = gate.weight.shape == up.weight.shape and (gate.bias is None) == (up.bias is None)  # type: ignore[union-attr]
            if act is None or not same or len(others) > 1:
                return None
            return GatedFeedForward(names, (gate, up, down), act)  # type: ignore[arg-type]
    return None


def activation(module: nn.Module | None, owner: nn.Module) -> str | None:
    """The name of our activation that gives what a module (or the owner's `act_fn`) gives."""
    theirs = module if module is not None else next(
        (found for name in ("act_fn", "act", "activation_fn") if callable(found := getattr(owner, name, None))), None
    )  # fmt: skip
    if theirs is None:
        return None
    x = torch.linspace(-6.0, 6.0, 193)
    with torch.no_grad():
        expected = theirs(x)
        return next((name for name in ACTIVATIONS if apart(activate(x, name), expected) < 1e-6), None)
