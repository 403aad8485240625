"""Masters: the trained weights in fp32 as an optimizer sees them, whatever ZeRO made of the module.

    module's weight   FSDP2's slice of it, fp32        16 bit, on one rank alone; or on a device, its states offloaded
    master            the same memory, a plain tensor  an fp32 copy, in the host's memory or on disk if states are
    its gradient      FSDP2's sum over ranks           summed in fp32 after each micro-batch

An optimizer that looks at one number at a time does the same on slices as on wholes, so any of torch's will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...kernels.optimizer import add_squares
from ...parallel import Mesh
from ..offload import Offload
from ..zero import local


class Masters:
    """fp32 parameters by the module's names, for an optimizer to move."""

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        mesh: Mesh,
        narrow: torch.dtype | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Of the parameters `names`; with `narrow`, the module's floating weights become that here."""
        found, self._mesh = dict(module.named_parameters()), mesh
        self.offload = offload or Offload()
        self.weights = {name: found[name] for name in names}
        away = self.offload.keeps_states and any(weight.device.type != "cpu" for weight in self.weights.values())
        self.copied = narrow is not None or away
        self.params = {name: nn.Parameter(self._made(name, weight)) for name, weight in self.weights.items()}
        if narrow is not None:
            for weight in found.values():
                if weight.is_floating_point():
                    weight.data = weight.data.to(narrow)
        self._sums: dict[str, Tensor] = {}

    def _made(self, name: str, weight: Tensor) -> Tensor:
        mine = local(weight.detach())
        if not self.copied:
            return mine
        if not self.offload.keeps_states:
            return mine.clone()
        return self.offload.zeros(f"master.{name}", mine.shape).copy_(mine)

    @torch.no_grad()
    def collect(self) -> None:
        """After each backward pass: the gradient of what has a copy goes into its fp32 sum."""
        if not self.copied:
            return
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            grad = local(weight.grad).to(self.params[name].device, torch.float32)
            self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad
            weight.grad = None

    @torch.no_grad()
    def deliver(self) -> float:
        """Put every gradient on its master; the norm of all of them over all ranks, not finite when one is not."""
        for name, master in self.params.items():
            weight = self.weights[name]
            if self.copied:
                master.grad = self._sums.get(name)
                continue
            master.data = local(weight.detach())  # FSDP2 may have moved it
            master.grad = None if weight.grad is None else local(weight.grad).contiguous()
        grads = [(name, master.grad) for name, master in self.params.items() if master.grad is not None]
        squares = dict.fromkeys((name for name, _ in grads), 0.0)
        if grads:
            add_squares(squares, grads)
        return math.sqrt(self._mesh.sum("norm", sum(squares.values()))[0])

    @torch.no_grad()
    def written(self) -> None:
        """After masters have moved: the module's weights follow."""
        if self.copied:
            for name, master in self.params.items():
                local(self.weights[name].detach()).copy_(master)
        self.offload.settle()

    def zero(self) -> None:
        """Let all gradients go."""
        self._sums.clear()
        for name, master in self.params.items():
            master.grad = self.weights[name].grad = None

    def value(self, name: str, weight: Tensor) -> Tensor:
        """The most exact that there is of a weight: its copy, or itself."""
        return self.params[name].detach() if self.copied and name in self.params else weight
