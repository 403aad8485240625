"""Rules: how gradients become changes of the weights. One for each `optimizer.name`; the Optimizer knows none of them.

A rule works on shards: fp32 tensors on this rank, whole or a slice along their first dimension. Most look at one number
at a time, so they take any slice and can be run tile by tile; LAMB needs norms of whole tensors, Muon whole matrices,
and ask their Peers for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..core import ConfigError
from ..kernels.optimizer import Shard, adagrad, adam, adamw, lion, orthogonalised, sgd
from .config import OptimizerConfig
from .peers import Alone, Peers

Parts = Sequence[tuple[int | slice, ...]]
"""The places of a parameter's matrices: ((slice(0, 64),), (slice(64, 96),)), or ((0,), (1,)) of stacked experts."""


class Rule(Protocol):
    """What turns gradients into updates. `states` names what it keeps, fp32 and as large as the weight, zero at first.

    `elementwise` says that any slice or tile of a tensor may be updated alone.
    """

    @property
    def states(self) -> tuple[str, ...]: ...

    @property
    def elementwise(self) -> bool: ...

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        """Update weights and states in place; gradients count times `scale`."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """See `kernels.optimizer.adamw`; `share` of the rate. After `freeze_step` updates the squares stand still."""

    betas: tuple[float, float]
    eps: float
    share: float = 1.0
    freeze_step: int | None = None
    states: ClassVar = ("exp_avg", "exp_avg_sq")
    elementwise: ClassVar = True

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        last = self.freeze_step or math.inf
        moving, still = [it for it in shards if it.steps <= last], [it for it in shards if it.steps > last]
        for due, frozen in ((moving, 0), (still, self.freeze_step or 0)):
            if due:
                adamw(due, rate=rate * self.share, betas=self.betas, eps=self.eps, scale=scale, frozen=frozen)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """See `kernels.optimizer.adam`."""

    betas: tuple[float, float]
    eps: float
    states: ClassVar = ("exp_avg", "exp_avg_sq")
    elementwise: ClassVar = True

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        adam(shards, rate=rate, betas=self.betas, eps=self.eps, scale=scale)


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """See `kernels.optimizer.sgd`; without momentum it keeps nothing."""

    momentum: float
    nesterov: bool
    elementwise: ClassVar = True

    @property
    def states(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        sgd(shards, rate=rate, momentum=self.momentum, nesterov=self.nesterov, scale=scale)


@dataclass(frozen=True, kw_only=True)
class Lion:
    """See `kernels.optimizer.lion`."""

    betas: tuple[float, float]
    states: ClassVar = ("exp_avg",)
    elementwise: ClassVar = True

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        lion(shards, rate=rate, betas=self.betas, scale=scale)


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """See `kernels.optimizer.adagrad`."""

    eps: float
    states: ClassVar = ("sum",)
    elementwise: ClassVar = True

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        adagrad(shards, rate=rate, eps=self.eps, scale=scale)


@dataclass(frozen=True, kw_only=True)
class Lamb:
    """LAMB (You et al. 2020): AdamW's direction, as long as the tensor itself, so that large batches train.

    `trust` bounds norm of the weights / norm of the direction, which the rate is multiplied by.
    """

    betas: tuple[float, float]
    eps: float
    trust: tuple[float, float]
    peers: Peers = field(default_factory=Alone)
    states: ClassVar = ("exp_avg", "exp_avg_sq")
    elementwise: ClassVar = False

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        if not shards:
            return
        squares = []
        for it in shards:
            (mean, square), grad = it.states, it.grad * scale
            mean.lerp_(grad, 1.0 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(grad, grad, value=1.0 - self.betas[1])
            squares.append(torch.stack([x.double().square().sum() for x in (it.weight, self._direction(it))]))
        norms_N2 = self.peers.sum([it.name for it in shards], torch.stack(squares)).sqrt()
        least, most = self.trust
        for it, (weight, direction) in zip(shards, norms_N2.tolist()):
            ratio = min(max(weight / direction, least), most) if weight and direction else 1.0
            it.weight.add_(self._direction(it), alpha=-rate * ratio)

    def _direction(self, it: Shard) -> Tensor:
        mean, square = it.states
        root = (1.0 - self.betas[1] ** it.steps) ** 0.5
        turn: Tensor = mean / (1.0 - self.betas[0] ** it.steps) / (square.sqrt() / root).add_(self.eps)
        return turn.add_(it.weight, alpha=it.decay)


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon (Jordan et al. 2024): the momentum of a matrix with all its singular values near 1.

    `parts` has the matrices of each tensor: those of a fused weight and the experts of a stack are turned one by one.
    """

    momentum: float
    nesterov: bool
    adjust: str
    parts: Mapping[str, Parts]
    peers: Peers = field(default_factory=Alone)
    states: ClassVar = ("momentum_buffer",)
    elementwise: ClassVar = False

    def step(self, shards: Sequence[Shard], rate: float, scale: float) -> None:
        for it in shards:
            (mean,), grad = it.states, it.grad * scale
            mean.lerp_(grad, 1.0 - self.momentum)
            whole = self.peers.gather(it.name, grad.lerp(mean, self.momentum) if self.nesterov else mean)
            turned = torch.empty_like(whole)
            for at in self.parts[it.name]:
                turned[at] = orthogonalised(whole[at]) * self._longer(*whole[at].shape)
            it.weight.mul_(1.0 - rate * it.decay).add_(self.peers.scatter(it.name, turned), alpha=-rate)

    def _longer(self, rows: int, columns: int) -> float:
        """Jordan's factor for tall matrices, or what makes the numbers of an update as large as AdamW's (Liu 2025)."""
        if self.adjust == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def rules_for(
    config: OptimizerConfig, names: Iterable[str], *, matrices: Mapping[str, Parts] | None = None, peers: Peers
) -> list[tuple[Rule, list[str]]]:
    """The recipe's rule, and the names of the tensors that it is for; the rest of Muon's are AdamW's.

    Raises:
        ConfigError: Muon, and no tensor is a matrix of a layer.
    """
    numbers, names = config.numbers(), list(names)
    numbers.pop("weight_decay")
    for key in ("betas", "trust"):
        if key in numbers:
            numbers[key] = (numbers[key][0], numbers[key][1])
    if config.name == "muon":
        return _muon_and_adamw(config.lr, numbers, names, matrices or {}, peers)
    if config.name == "lamb":
        return [(Lamb(**numbers, peers=peers), names)]
    kinds: dict[str, type[AdamW | Adam | Sgd | Lion | Adagrad]] = {
        "adamw": AdamW,
        "adam": Adam,
        "sgd": Sgd,
        "lion": Lion,
        "adagrad": Adagrad,
    }
    return [(kinds[config.name](**numbers), names)]


def _muon_and_adamw(
    lr: float, numbers: dict[str, Any], names: list[str], matrices: Mapping[str, Parts], peers: Peers
) -> list[tuple[Rule, list[str]]]:
    mine = [name for name in names if name in matrices]
    if not mine:
        raise ConfigError("muon is for the matrices of a decoder's layers, and this model has none: choose adamw")
    share = (numbers.pop("adamw_lr") or lr) / lr
    rest = AdamW(betas=numbers.pop("betas"), eps=numbers.pop("eps"), share=share)
    return [(Muon(**numbers, parts=matrices, peers=peers), mine), (rest, [n for n in names if n not in matrices])]
