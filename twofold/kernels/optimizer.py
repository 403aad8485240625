"""AdamW over any number of fp32 tensors in one pass over memory, and the norm of all gradients.

The clip's factor is part of the pass, so gradients are read once for the norm and once for the update, never written.

    step(shards, scale=clip / norm)      28 bytes a weight, where scaling gradients first takes 36
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .op import op

PIECE = 16384


@dataclass(frozen=True, slots=True)
class Shard:
    """One tensor to update: fp32 and contiguous, its gradient, its two moments, and how many updates it has had."""

    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    steps: int
    decay: float


@op
def adamw(shards: Sequence[Shard], *, rate: float, betas: tuple[float, float], eps: float, scale: float = 1.0) -> None:
    """One update of every shard in place by torch.optim.AdamW's formula, gradients times `scale`.

    `steps` of a shard counts this update, `decay` is its weight decay (decoupled, times `rate`).
    """
    beta1, beta2 = betas
    for it in shards:
        grad = it.grad * scale
        it.weight.mul_(1.0 - rate * it.decay)
        it.mean.lerp_(grad, 1.0 - beta1)
        it.square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        root = (1.0 - beta2**it.steps) ** 0.5
        it.weight.addcdiv_(it.mean, (it.square.sqrt() / root).add_(eps), value=-rate / (1.0 - beta1**it.steps))


@op
def gradient_norm(grads: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients together; not finite when one of them is not."""
    if not grads:
        return 0.0
    return float(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt())


@adamw.on("native", why="one pass for all tensors, the clip's factor in it", missing=native.missing, bits="own")
def _adamw(shards: Sequence[Shard], *, rate: float, betas: tuple[float, float], eps: float, scale: float = 1.0) -> None:
    if not all(_fits(part) for it in shards for part in (it.weight, it.grad, it.mean, it.square)):
        adamw.reference(shards, rate=rate, betas=betas, eps=eps, scale=scale)
        return
    beta1, beta2 = betas
    listed = (_Shard * len(shards))()
    at = 0
    for place, it in zip(listed, shards):
        place.weight, place.grad, place.mean, place.square = (
            part.data_ptr() for part in (it.weight, it.grad, it.mean, it.square)
        )
        place.count, place.first = it.weight.numel(), at
        place.decay = 1.0 - rate * it.decay
        place.rate, place.root = rate / (1.0 - beta1**it.steps), (1.0 - beta2**it.steps) ** 0.5
        at += -(-place.count // PIECE)
    _run(
        Adam(
            shards=len(shards),
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            scale=scale,
            shard_size=ctypes.sizeof(_Shard),
            list=ctypes.addressof(listed),
        )
    )


@gradient_norm.on("native", why="one pass for all tensors, in double, in one order", missing=native.missing, bits="own")
def _gradient_norm(grads: Sequence[Tensor]) -> float:
    if not all(_fits(grad) for grad in grads):
        return gradient_norm.reference(grads)
    listed = (_Shard * len(grads))()
    at = 0
    for place, grad in zip(listed, grads):
        place.grad, place.count, place.first = grad.data_ptr(), grad.numel(), at
        at += -(-place.count // PIECE)
    sums = (c_double * at)()
    _run(
        SquareSums(
            shards=len(grads),
            shard_size=ctypes.sizeof(_Shard),
            list=ctypes.addressof(listed),
            sums=ctypes.addressof(sums),
        )
    )
    return float(sum(sums) ** 0.5)


class _Shard(Structure):
    """`Shard` of `cpu/optimizer.cpp`, field by field."""

    _fields_ = (
        ("weight", c_void_p),
        ("grad", c_void_p),
        ("mean", c_void_p),
        ("square", c_void_p),
        ("count", c_int64),
        ("first", c_int64),
        ("decay", c_float),
        ("rate", c_float),
        ("root", c_float),
        ("unused", c_int32),
    )


class Adam(Structure):
    _fields_ = (
        ("shards", c_int32),
        ("beta1", c_float),
        ("beta2", c_float),
        ("eps", c_float),
        ("scale", c_float),
        ("shard_size", c_int32),
        ("list", c_void_p),
    )


class SquareSums(Structure):
    _fields_ = (("shards", c_int32), ("shard_size", c_int32), ("list", c_void_p), ("sums", c_void_p))


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def _run(stage: Structure) -> None:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    library.run([stage], torch.get_num_threads())
