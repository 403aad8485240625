"""Weights that lie in files: mapped, brought before a layer is run and let go after it.

    forward     embed ─▶ layer 0 ─▶ layer 1 ─▶ ... ─▶ norm, head
    backward             layer 0 ◀─ layer 1 ◀─ ... ◀─
                             the next one is on its way from the disk while this one is run, and the last one has gone

A weight is the file, mapped: it has one address for good, so whatever autograd saved of it stays true, a tied table is
one table, and the serving engine can sample from it. Bringing and letting go are about its pages; without them the
numbers are the same and come later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..models.decoder import Decoder
from ..platforms.host import HostPool

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def place_weights(decoder: Decoder, pool: HostPool) -> dict[str, Tensor]:
    """Memory from a pool for the parameters of a decoder that was built on the meta device, all zero; by name."""
    wanted = {f"weight.{name}": (tuple(p.shape), p.dtype) for name, p in decoder.named_parameters()}
    fresh = pool.allocate(wanted)
    for place, module in decoder.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{place}.{name}" if place else name
            module._parameters[name] = nn.Parameter(fresh[f"weight.{path}"], parameter.requires_grad)
    return {name.removeprefix("weight."): tensor for name, tensor in fresh.items()}


def move_weights(decoder: Decoder, pool: HostPool) -> dict[str, Tensor]:
    """Move the parameters of a decoder that FSDP2 has divided into a pool: this rank's slices, by name.

    FSDP2 takes them up at its first forward. It pads slices that are shorter than other ranks' in memory of its own, so
    those stay where they are.
    """
    from torch.distributed.tensor import DTensor

    even = {name: p for name, p in decoder.named_parameters() if isinstance(p, DTensor) and _is_even(p)}
    slices = {name: p.to_local().detach() for name, p in even.items()}
    fresh = pool.allocate({f"weight.{name}": (tuple(it.shape), it.dtype) for name, it in slices.items()})
    for name, p in even.items():
        kept = fresh[f"weight.{name}"]
        kept.copy_(slices[name])
        pool.let_go(kept)
        whole = DTensor.from_local(kept, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        place, _, leaf = name.rpartition(".")
        decoder.get_submodule(place)._parameters[leaf] = nn.Parameter(whole, p.requires_grad)
    return {name: fresh[f"weight.{name}"] for name in even}


def _is_even(p: DTensor) -> bool:
    ranks = math.prod(size for size, how in zip(p.device_mesh.shape, p.placements) if how.is_shard())
    return p.to_local().shape[0] * ranks == p.shape[0]


class Visits:
    """Knows which layer is run, and has the pages of that one and of the next."""

    def __init__(self, decoder: Decoder, weights: Mapping[str, Tensor], pool: HostPool) -> None:
        def under(*prefixes: str) -> list[Tensor]:
            return [weight for name, weight in weights.items() if name.startswith(prefixes)]

        self._pool = pool
        tied = ("embed.",) if decoder.spec.tied else ()
        layers = range(len(decoder.layers))
        self._front, self._back = under("embed", "positions."), under("norm.", "head", "score.", *tied)
        self._stops = [self._front, *(under(f"layers.{i}.") for i in layers), self._back]
        self.forget()
        for i, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(partial(self._forward, i + 1))
            layer.register_forward_hook(partial(self._ran, i + 1))

    def forget(self) -> None:
        """Whatever was here has gone."""
        self._here = (0, 0)
        self._coming: Future[None] | None = None

    def _enter(self, at: int, ahead: int) -> None:
        """Stop `at` is run now, and the one `ahead` of it next."""
        if (at, ahead) == self._here:
            return
        if self._coming:
            self._coming.result()
        if self._here[0] != at:
            self._pool.let_go(*self._stops[self._here[0]])
        if at in (1, len(self._stops) - 2):  # the ends are not layers: nobody says when they have been run
            self._pool.let_go(*self._front, *self._back)
        self._here = at, ahead
        self._coming = self._pool.bring(*self._stops[at + ahead])

    def _forward(self, at: int, layer: nn.Module, args: Any) -> None:
        self._enter(at, 1)

    def _ran(self, at: int, layer: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(partial(self._backward, at))

    def _backward(self, at: int, grad: Tensor) -> None:
        self._enter(at, -1)
