"""Recompute what is cheap, keep what is dear: a tensor that an op made in one pass is kept as a recipe.

    norm(x) = n ──▶ linear saves n          kept: how n is made of x, and x, which the norm keeps anyway
    gated(h) = g ──▶ linear saves g         kept: h
    rotate(norm(q)) = r ──▶ attention       kept: a recipe of a recipe, and q, a view of what the product gave

Products and attention are never run again. The residual stream is kept, in place of the two products' outputs that it
is the sum of: the same bytes. Twofold's ops are autograd functions of their own; torch's selective checkpoint looks at
aten's calls and cannot see into them. The idea is from Korthikanti et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.flops import PASSES
from ..kernels.op import Op, watch
from .kept import Keeper

CHEAP = PASSES & {"rms_norm", "layer_norm", "activate", "gated", "rotate"}


class Recipe(NamedTuple):
    """An op and its arguments, tensors among them packed as saved ones are."""

    op: Op[..., Any]
    args: tuple[Any, ...]


class Made(NamedTuple):
    """How a saved tensor lies in what a recipe makes."""

    recipe: Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Packed(NamedTuple):
    """A tensor in a keeper's care."""

    kept: Any


class Recipes:
    """Packs and unpacks what is saved in one run of a layer; ops named in `cheap` are run again, not kept."""

    def __init__(self, keeper: Keeper, cheap: Collection[str] = CHEAP) -> None:
        self._keeper, self._cheap = keeper, cheap
        self._made: dict[int, tuple[Tensor, Recipe]] = {}

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What ops save inside is packed here; what cheap ops make is known until the end."""
        with saved_tensors_hooks(self.pack, self.unpack), watch(self._watch):
            try:
                yield
            finally:
                self._made.clear()

    def pack(self, tensor: Tensor) -> Any:
        """A weight as it is, what a cheap op made as its recipe, all else into the keeper's care."""
        if is_weight(tensor):
            return tensor
        found = self._made.get(tensor.untyped_storage().data_ptr())
        if found is not None:
            return Made(found[1], tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return Packed(self._keeper.keep(tensor))

    def unpack(self, packed: Any) -> Any:
        """What was packed; a recipe is followed now."""
        if isinstance(packed, Packed):
            return self._keeper.fetch(packed.kept)
        if isinstance(packed, Made):
            op, args = packed.recipe
            with torch.no_grad():
                out: Tensor = op(*map(self.unpack, args))
            return out.as_strided(packed.size, packed.stride, packed.offset)
        return packed

    def _watch(self, op: Op[..., Any], args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        out = call()
        if op.name in self._cheap and torch.is_grad_enabled() and out.requires_grad and out.numel():
            packed = tuple(self.pack(arg) if isinstance(arg, Tensor) else arg for arg in args)
            self._made[out.untyped_storage().data_ptr()] = out, Recipe(op, packed)  # held, so that its place is its own
        return out


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one: these stay, whoever shards or gathers them."""
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter)
