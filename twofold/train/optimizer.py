"""Optimizer: fp32 masters, what the rule keeps of them, and the four moves of a step: collect, clip, step, zero.

    fp32 run       weight (this rank's slice) ◀── rule ◀── its gradient
    16-bit run     weight ◀─round─ master ◀── rule ◀── gradients of all micro-batches, summed in fp32

Masters are the model's own weights in an fp32 run. Everything is by the parameter's name; of a DTensor, only this
rank's slice is ever touched, as a plain tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..core import CheckpointError
from ..kernels.optimizer import Shard, add_squares
from .config import OptimizerConfig
from .offload import Offload
from .peers import Peers, peers_of
from .rules import Parts, rules_for
from .zero import local

Norm = Callable[[Mapping[str, float]], float]
"""The sums of squares of this rank's slices of the gradient, by name, to the Euclidean norm of the whole model's."""


def decay_groups(named: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[str]]:
    """Names that weight decay touches (matrices, embeddings) and names that it leaves alone (norms, biases)."""
    decay: list[str] = []
    keep: list[str] = []
    for name, weight in named:
        (decay if weight.ndim >= 2 else keep).append(name)
    return decay, keep


class Optimizer:
    """The masters, their states, and the four moves of a step.

    `matrices` are the parts that Muon turns (`models.layout.matrices`). `peers` hold the other slices of the tensors
    (left out: those that DTensors name); `norm` is of the whole model's gradient, from squares of this rank's slices.
    `offload` has what is kept while it is not worked on.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        config: OptimizerConfig,
        *,
        matrices: Mapping[str, Parts] | None = None,
        peers: Peers | None = None,
        norm: Norm | None = None,
        offload: Offload | None = None,
    ) -> None:
        self.config, self.norm = config, norm
        self.weights = {name: weight for name, weight in named if weight.requires_grad}
        self.groups = rules_for(config, self.weights, matrices=matrices, peers=peers or peers_of(self.weights))
        self.rules = {name: rule for rule, names in self.groups for name in names}
        decay = config.numbers()["weight_decay"]
        self.decay = dict.fromkeys(decay_groups(self.weights.items())[0], decay)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.steps: dict[str, int] = {}
        self.offload = offload or Offload()
        self._summing = self.offload.gradients(self.weights, local)
        self._copies = {name: self._copy(name) for name, weight in self.weights.items() if self._apart(weight)}
        self._sums: dict[str, Tensor] = {}
        self._factor = 1.0

    def master(self, name: str) -> Tensor:
        """This rank's slice of a weight in fp32."""
        copy = self._copies.get(name)
        return local(self.weights[name].detach()) if copy is None else copy

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Give this rank's slice of a weight another value, and its master where it has one apart."""
        self.master(name).copy_(value)
        if name in self._copies:
            local(self.weights[name].detach()).copy_(value)

    def gradient(self, name: str) -> Tensor | None:
        """What `step` will read: the slice's gradient, as many times too large as the loss was scaled."""
        if self._summing:
            return self._summing.get(name)
        if name in self._copies:
            return self._sums.get(name)
        grad = self.weights[name].grad
        return None if grad is None else local(grad)

    @torch.no_grad()
    def collect(self) -> None:
        """After each micro-batch: add the gradients of 16-bit weights to sums in fp32, and let them go."""
        if self._summing:
            self._summing.collect()
            return
        for name in self._copies:
            weight = self.weights[name]
            if weight.grad is None:
                continue
            if name in self._sums:
                self._sums[name] += local(weight.grad)
            else:
                self._sums[name] = local(weight.grad).float()
            weight.grad = None

    def clip(self, scale: float = 1.0) -> float:
        """The gradients' global norm, the same on every rank; not finite when one of them is not.

        The loss was multiplied by `scale`: the norm is without it, and so is the next step, which clips by the norm.
        The gradients themselves are not touched: the factor is part of the step's one pass.
        """
        grads = {name: grad for name in self.weights if (grad := self.gradient(name)) is not None}
        squares = dict.fromkeys(grads, 0.0)
        for pieces in self.offload.pieces(grads):
            add_squares(squares, pieces)
        norm = (math.sqrt(sum(squares.values())) if self.norm is None else self.norm(squares)) / scale
        self._factor = min(1.0, self.config.clip / (norm + 1e-6)) / scale if math.isfinite(norm) else 1.0
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at rate `lr`; in a 16-bit run the model's weights are rounded from the masters."""
        for rule, names in self.groups:
            due = [(name, grad) for name in names if (grad := self.gradient(name)) is not None]
            for name, _ in due:
                self.steps[name] = self.steps.get(name, 0) + 1
            for shards in self.offload.tiles([self.shard(name, grad) for name, grad in due], not rule.elementwise):
                rule.step(shards, lr, self._factor)
                for it in shards:
                    if it.narrow is not None:
                        it.narrow.copy_(it.weight)
        self._factor = 1.0

    def shard(self, name: str, grad: Tensor) -> Shard:
        """What the rule updates: master, gradient, and what it keeps."""
        return Shard(
            weight=self.master(name),
            grad=grad.to(self.master(name).device).contiguous(),
            states=tuple(self.keeps(name).values()),
            steps=self.steps.get(name, 0),
            decay=self.decay.get(name, 0.0),
            name=name,
            narrow=local(self.weights[name].detach()) if name in self._copies else None,
        )

    def keeps(self, name: str) -> dict[str, Tensor]:
        """What the rule keeps of a weight, by the rule's names for it; made when it is first asked for."""
        if name not in self.kept:
            shape = self.master(name).shape
            self.kept[name] = {key: self._zeros(f"{key}.{name}", shape) for key in self.rules[name].states}
        return self.kept[name]

    def zero(self) -> None:
        """Let all gradients go."""
        self._factor = 1.0
        if self._summing:
            self._summing.zero()
        self._sums.clear()
        for weight in self.weights.values():
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from, by name: what the rule keeps, and the masters of a 16-bit run."""
        out: dict[str, Tensor] = {}
        for name in self.weights:
            if name in self.steps:
                out[f"step.{name}"] = torch.tensor(float(self.steps[name]))
            out |= {f"{key}.{name}": value for key, value in self.kept.get(name, {}).items()}
            if name in self._copies and self.weights[name].dtype != torch.float32:
                out[f"master.{name}"] = self._copies[name]
        return out

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the state back.

        Raises:
            CheckpointError: a tensor is missing, left over, or has another shape; it is named.
        """
        left = dict(tensors)
        for name in self.weights:
            master = self.master(name)
            if name in self._copies:
                weight = self.weights[name]
                exact = weight.dtype == torch.float32
                master.copy_(local(weight.detach()) if exact else _take(left, f"master.{name}", master.shape))
                self.offload.let_go(master)
            if f"step.{name}" in left:
                self.steps[name] = int(_take(left, f"step.{name}", torch.Size([])))
                for key, kept in self.keeps(name).items():
                    kept.copy_(_take(left, f"{key}.{name}", master.shape))
                    self.offload.let_go(kept)
        if left:
            raise CheckpointError(f"the optimizer's state has a tensor this model does not: {sorted(left)[0]}")

    @torch.no_grad()
    def forget(self) -> None:
        """Keep nothing of earlier steps, as before the first."""
        self.zero()
        self.steps.clear()
        for kept in self.kept.values():
            for value in kept.values():
                value.zero_()
                self.offload.let_go(value)

    def _zeros(self, name: str, shape: torch.Size) -> Tensor:
        return self.offload.zeros(name, shape, next(iter(self.weights.values())).device)

    def _apart(self, weight: Tensor) -> bool:
        """Whether a weight has a master of its own: a 16-bit one, or one of a device whose states the host keeps."""
        return weight.dtype != torch.float32 or (self.offload.keeps_states and weight.device.type != "cpu")

    @torch.no_grad()
    def _copy(self, name: str) -> Tensor:
        weight = local(self.weights[name].detach())
        copy = self._zeros(f"master.{name}", weight.shape).copy_(weight)
        self.offload.let_go(copy, weight)
        return copy


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"the optimizer's state lacks '{name}'")
    found = tensors.pop(name)
    if found.shape != shape:
        raise CheckpointError(f"the optimizer's state: '{name}' is {list(found.shape)}, the model's is {list(shape)}")
    return found
