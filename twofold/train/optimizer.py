"""AdamW over fp32 masters: the model's own weights in an fp32 run, copies of them in a bf16 run.

Gradients are summed over micro-batches in fp32 in both cases, and clipped by their global norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..core import CheckpointError
from ..kernels.optimizer import Shard, adamw, gradient_norm
from .config import OptimizerConfig
from .zero import local

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def decay_groups(named: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[str]]:
    """Names that weight decay touches (matrices, embeddings) and names that it leaves alone (norms, biases)."""
    decay: list[str] = []
    keep: list[str] = []
    for name, weight in named:
        (decay if weight.ndim >= 2 else keep).append(name)
    return decay, keep


class Optimizer:
    """The masters, their moments, and the four moves of a step: collect, clip, step, zero."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, total: Callable[[float], float] | None = None
    ) -> None:
        """`total` adds up the squares of the gradient over the ranks that hold the model between them."""
        self.config, self._total = config, total
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.weights.items()
        }
        self.mixed = any(self.masters[name] is not p for name, p in self.weights.items())
        self.decay = dict.fromkeys(decay_groups(self.masters.items())[0], config.weight_decay)
        self.moments: dict[str, dict[str, Tensor]] = {}
        self._scale = 1.0

    @torch.no_grad()
    def collect(self) -> None:
        """After each micro-batch of a bf16 run: add its gradients to the masters' in fp32 and let them go."""
        if not self.mixed:
            return
        for name, weight in self.weights.items():
            master = self.masters[name]
            if weight is master or weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None

    def clip(self) -> float:
        """The gradients' global norm, not finite when they are not; the next step clips by it.

        The gradients themselves are not touched: the factor is part of the step's one pass.
        """
        norm = gradient_norm([local(m.grad) for m in self.masters.values() if m.grad is not None])
        if self._total is not None:
            norm = math.sqrt(self._total(norm * norm))
        self._scale = min(1.0, self.config.clip / (norm + 1e-6)) if math.isfinite(norm) else 1.0
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW update at rate `lr`; in a bf16 run the model's weights are rounded from the masters."""
        adamw(
            [self._shard(name, m, m.grad) for name, m in self.masters.items() if m.grad is not None],
            rate=lr,
            betas=(self.config.betas[0], self.config.betas[1]),
            eps=self.config.eps,
            scale=self._scale,
        )
        self._scale = 1.0
        if self.mixed:
            for name, weight in self.weights.items():
                if weight is not self.masters[name]:
                    weight.copy_(self.masters[name])

    def _shard(self, name: str, master: Tensor, grad: Tensor) -> Shard:
        weight = local(master.detach())
        if name not in self.moments:
            zeros = {key: torch.zeros_like(weight) for key in MOMENTS[1:]}
            self.moments[name] = {"step": torch.zeros(()), **zeros}
        moments = self.moments[name]
        moments["step"] += 1
        return Shard(
            weight=weight,
            grad=local(grad).contiguous(),
            mean=moments["exp_avg"],
            square=moments["exp_avg_sq"],
            steps=int(moments["step"]),
            decay=self.decay.get(name, 0.0),
        )

    def zero(self) -> None:
        """Let all gradients go."""
        self._scale = 1.0
        for name, weight in self.weights.items():
            weight.grad = None
            self.masters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from, by name: moments, and the masters of a bf16 run."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.moments.get(name, {}).items():
                out[f"{key}.{name}"] = value
            if master is not self.weights[name]:
                out[f"master.{name}"] = master.detach()
        return out

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the state back.

        Raises:
            CheckpointError: a tensor is missing, left over, or has another shape; it is named.
        """
        left = dict(tensors)
        for name, master in self.masters.items():
            if master is not self.weights[name]:
                master.copy_(_take(left, f"master.{name}", master.shape))
            if f"step.{name}" in left:
                shapes = {"step": torch.Size([]), "exp_avg": master.shape, "exp_avg_sq": master.shape}
                self.moments[name] = {k: _take(left, f"{k}.{name}", shapes[k]).clone() for k in MOMENTS}
        if left:
            raise CheckpointError(f"optimizer.safetensors has a tensor this model does not: {sorted(left)[0]}")


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"optimizer.safetensors lacks '{name}'")
    found = tensors.pop(name)
    if found.shape != shape:
        raise CheckpointError(f"optimizer.safetensors: '{name}' is {list(found.shape)}, the model's is {list(shape)}")
    return found
