"""Elementwise optimizers over any number of fp32 tensors in one pass over memory, and the squares of all gradients.

The clip's factor is part of the pass, so gradients are read once for the norm and once for the update, never written.

    adamw(shards, scale=clip / norm)      28 bytes a weight, where scaling gradients first takes 36

An update needs nothing but the numbers at its own place, so a shard may be any slice or tile of a tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from . import native
from .op import op

PIECE = 16384
WHY = "one pass for all tensors, the clip's factor in it"


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor to update, or a slice of one: fp32 and contiguous, its gradient, and what is kept for each number.

    `steps` counts the updates, this one with them; `decay` is its weight decay; `name` is the whole tensor's. `narrow`
    is the model's own 16-bit weight, where the fp32 one is its master: no rule touches it.
    """

    weight: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]
    steps: int
    decay: float
    name: str = ""
    narrow: Tensor | None = None


@op
def adamw(
    shards: Sequence[Shard], rate: float, betas: tuple[float, float], eps: float, scale: float = 1.0, frozen: int = 0
) -> None:
    """One update of every shard in place by torch.optim.AdamW's formula, gradients times `scale`; states: mean, square.

    Weight decay is decoupled: it shrinks the weight by `rate` times itself (Loshchilov and Hutter 2019). `frozen`: the
    squares stand still, as they were after so many updates; 0: they do not.
    """
    for it in shards:
        it.weight.mul_(1.0 - rate * it.decay)
        _adam_step(it, it.grad * scale, rate, betas, eps, frozen)


@op
def adam(shards: Sequence[Shard], rate: float, betas: tuple[float, float], eps: float, scale: float = 1.0) -> None:
    """torch.optim.Adam: as `adamw`, but weight decay is added to the gradient (Kingma and Ba 2015)."""
    for it in shards:
        _adam_step(it, it.grad * scale + it.decay * it.weight, rate, betas, eps)


def _adam_step(it: Shard, grad: Tensor, rate: float, betas: tuple[float, float], eps: float, frozen: int = 0) -> None:
    (mean, square), (beta1, beta2) = it.states, betas
    mean.lerp_(grad, 1.0 - beta1)
    if not frozen:
        square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    root = (1.0 - beta2 ** (frozen or it.steps)) ** 0.5
    it.weight.addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-rate / (1.0 - beta1**it.steps))


@op
def sgd(
    shards: Sequence[Shard], rate: float, momentum: float = 0.0, nesterov: bool = False, scale: float = 1.0
) -> None:
    """torch.optim.SGD: the gradient, with weight decay added; with `momentum`, its running sum, the one state."""
    for it in shards:
        grad = it.grad * scale + it.decay * it.weight
        if momentum:
            sum_ = it.states[0].mul_(momentum).add_(grad)
            grad = grad + momentum * sum_ if nesterov else sum_
        it.weight.add_(grad, alpha=-rate)


@op
def lion(shards: Sequence[Shard], rate: float, betas: tuple[float, float], scale: float = 1.0) -> None:
    """Lion (Chen et al. 2023): the sign of the gradient's average; one state, weight decay decoupled."""
    for it in shards:
        (mean,), grad = it.states, it.grad * scale
        it.weight.mul_(1.0 - rate * it.decay).add_(mean.lerp(grad, 1.0 - betas[0]).sign_(), alpha=-rate)
        mean.lerp_(grad, 1.0 - betas[1])


@op
def adagrad(shards: Sequence[Shard], rate: float, eps: float, scale: float = 1.0) -> None:
    """torch.optim.Adagrad (Duchi et al. 2011): the gradient over the root of all its squares; weight decay added."""
    for it in shards:
        grad = it.grad * scale + it.decay * it.weight
        squares = it.states[0].addcmul_(grad, grad)
        it.weight.addcdiv_(grad, squares.sqrt().add_(eps), value=-rate)


@op
def orthogonalised(matrix_NK: Tensor, steps: int = 5) -> Tensor:
    """The matrix with singular values near 1, by Newton and Schulz's iteration with Jordan's coefficients (Muon, 2024).

    After five steps they lie between about 0.7 and 1.2. On the CPU in fp32 (fp64 stays), elsewhere in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    narrow = torch.float32 if matrix_NK.device.type == "cpu" else torch.bfloat16
    x = matrix_NK if matrix_NK.dtype == torch.float64 else matrix_NK.to(narrow)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.t() if tall else x).to(matrix_NK.dtype)


@op
def square_sums(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of every PIECE numbers of each gradient, in order, fp64."""
    sums: list[Tensor] = []
    for grad in grads:
        squares = grad.double().square().reshape(-1)
        whole = len(squares) // PIECE * PIECE
        sums.append(squares[:whole].view(-1, PIECE).sum(1))
        if whole < len(squares):
            sums.append(squares[whole:].sum().view(1))
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64)


def add_squares(sums: dict[str, float], grads: Sequence[tuple[str, Tensor]]) -> None:
    """Add the sum of squares of each gradient to that of its name.

    A gradient may come in parts cut at multiples of PIECE, in order: the sums have the same bits.
    """
    squares = iter(square_sums([grad for _, grad in grads]).tolist())
    for name, grad in grads:
        for square in islice(squares, -(-grad.numel() // PIECE)):
            sums[name] += square


# ----------------------------------------------------------------------------------------------------- native
@adamw.on("native", why=WHY, missing=native.missing, bits="own")
def _adamw(
    shards: Sequence[Shard], rate: float, betas: tuple[float, float], eps: float, scale: float = 1.0, frozen: int = 0
) -> None:
    if _fit(shards):
        _update("adamw", shards, rate, scale, betas, eps, frozen)
    else:
        adamw.reference(shards, rate, betas, eps, scale, frozen)


@adam.on("native", why=WHY, missing=native.missing, bits="own")
def _adam(shards: Sequence[Shard], rate: float, betas: tuple[float, float], eps: float, scale: float = 1.0) -> None:
    if _fit(shards):
        _update("adam", shards, rate, scale, betas, eps)
    else:
        adam.reference(shards, rate, betas, eps, scale)


@sgd.on("native", why=WHY, missing=native.missing, bits="own")
def _sgd(
    shards: Sequence[Shard], rate: float, momentum: float = 0.0, nesterov: bool = False, scale: float = 1.0
) -> None:
    if _fit(shards):
        _update(("nesterov" if nesterov else "momentum") if momentum else "sgd", shards, rate, scale, (momentum, 0.0))
    else:
        sgd.reference(shards, rate, momentum, nesterov, scale)


@lion.on("native", why=WHY, missing=native.missing, bits="own")
def _lion(shards: Sequence[Shard], rate: float, betas: tuple[float, float], scale: float = 1.0) -> None:
    if _fit(shards):
        _update("lion", shards, rate, scale, betas)
    else:
        lion.reference(shards, rate, betas, scale)


@adagrad.on("native", why=WHY, missing=native.missing, bits="own")
def _adagrad(shards: Sequence[Shard], rate: float, eps: float, scale: float = 1.0) -> None:
    if _fit(shards):
        _update("adagrad", shards, rate, scale, eps=eps)
    else:
        adagrad.reference(shards, rate, eps, scale)


@square_sums.on("native", why="one pass for all tensors, in double, in one order", missing=native.missing, bits="own")
def _square_sums(grads: Sequence[Tensor]) -> Tensor:
    if not all(_fits(grad) for grad in grads):
        return square_sums.reference(grads)
    listed = (_Shard * len(grads))()
    at = 0
    for place, grad in zip(listed, grads):
        place.grad, place.count, place.first = grad.data_ptr(), grad.numel(), at
        at += -(-place.count // PIECE)
    sums = torch.empty(at, dtype=torch.float64)
    _run(
        SquareSums(
            shards=len(grads),
            shard_size=ctypes.sizeof(_Shard),
            list=ctypes.addressof(listed),
            sums=sums.data_ptr(),
        )
    )
    return sums


RULES = ("adamw", "adam", "sgd", "momentum", "nesterov", "lion", "adagrad")
"""In the order of `Rule` of `cpu/optimizer.cpp`."""


def _update(
    rule: str,
    shards: Sequence[Shard],
    rate: float,
    scale: float,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
    frozen: int = 0,
) -> None:
    listed = (_Shard * len(shards))()
    at = 0
    for place, it in zip(listed, shards):
        place.weight, place.grad = it.weight.data_ptr(), it.grad.data_ptr()
        place.state, place.square = (*(state.data_ptr() for state in it.states), None, None)[:2]
        place.count, place.first = it.weight.numel(), at
        place.decay = 1.0 - rate * it.decay if rule in ("adamw", "lion") else it.decay
        place.rate, place.root = rate, 1.0
        if rule in ("adamw", "adam"):
            place.rate = rate / (1.0 - betas[0] ** it.steps)
            place.root = (1.0 - betas[1] ** (frozen or it.steps)) ** 0.5
        at += -(-place.count // PIECE)
    _run(
        Update(
            shards=len(shards),
            rule=RULES.index(rule),
            beta1=betas[0],
            beta2=1.0 if frozen else betas[1],
            eps=eps,
            scale=scale,
            shard_size=ctypes.sizeof(_Shard),
            list=ctypes.addressof(listed),
        )
    )


class _Shard(Structure):
    """`Shard` of `cpu/optimizer.cpp`, field by field."""

    _fields_ = (
        ("weight", c_void_p),
        ("grad", c_void_p),
        ("state", c_void_p),
        ("square", c_void_p),
        ("count", c_int64),
        ("first", c_int64),
        ("decay", c_float),
        ("rate", c_float),
        ("root", c_float),
        ("unused", c_int32),
    )


class Update(Structure):
    _fields_ = (
        ("shards", c_int32),
        ("rule", c_int32),
        ("beta1", c_float),
        ("beta2", c_float),
        ("eps", c_float),
        ("scale", c_float),
        ("shard_size", c_int32),
        ("list", c_void_p),
    )


class SquareSums(Structure):
    _fields_ = (("shards", c_int32), ("shard_size", c_int32), ("list", c_void_p), ("sums", c_void_p))


def _fit(shards: Sequence[Shard]) -> bool:
    return all(_fits(part) for it in shards for part in (it.weight, it.grad, *it.states))


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def _run(stage: Structure) -> None:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    library.run([stage], torch.get_num_threads())
