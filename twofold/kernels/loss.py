"""Log-probabilities of given tokens, straight from hidden states: the logits of the whole vocabulary are never held.

    hidden [R, D] ──┬── head[0:4096]    ─▶ logits [R, 4096] ─▶ taken into each row's (largest, sum of exponentials)
                    ├── head[4096:8192] ─▶ the same buffer   ─▶ ...
                    └── the last piece  ─▶ log p(target)
    backward: each piece once more, turned into its gradient in place, then two products (Wijmans et al. 2024).

A token's log-probability has the bits that the engine reports for it. `keep` is for a caller that takes few rows at a
time and calls backward() for each: their logits are held instead of made again (three products, not four), and what the
weight's .grad has already is added to in place (a gradient as large as the head is neither made nor added up).

Shapes: R rows, D hidden size, V vocabulary, B a piece of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .activation import scaled
from .gradient import with_reference_gradient
from .linear import fits, linear
from .linear import stage_of as linear_stage
from .op import op
from .slopes import input_slopes, weight_slopes

PIECE_NUMBERS, PIECE_MULTIPLE = 1 << 21, 1024
"""Numbers of a piece of logits, about (8 MiB); pieces begin where the sum's blocks do."""
SLICE = 2048
"""Rows of a 16-bit weight whose gradient is made at a time, in fp32 first."""


@op
def token_logprobs(
    hidden_RD: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    ids_R: Tensor,
    multiplier: float = 1.0,
    softcap: float | None = None,
    keep: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """log p(id) [R] in nats of one id [R] for each row, whose scores are capped(multiplier · (w · hidden + b)) / T."""
    logits_RV = scaled(linear(hidden_RD, w_VD, b_V).float(), multiplier, softcap)
    return logprobs_of(tempered(logits_RV, temperature), ids_R)


@op
def logprobs_of(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    """log p(id) [R] in nats of one id [R] for each row of fp32 logits."""
    return torch.log_softmax(logits_RV, -1).gather(1, ids_R[:, None])[:, 0]


def tempered(logits_RV: Tensor, temperature: float) -> Tensor:
    """Logits [R, V] divided by a temperature, never multiplied by its inverse: the sampler's bits on every device."""
    if temperature == 1.0:
        return logits_RV
    return logits_RV / torch.tensor([[temperature]], dtype=logits_RV.dtype, device=logits_RV.device)


@token_logprobs.on(
    "native",
    why="a piece of the vocabulary at a time; the engine's bits, and a gradient in place",
    missing=native.missing,
    bits="own",
)
def _native(
    hidden_RD: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    ids_R: Tensor,
    multiplier: float = 1.0,
    softcap: float | None = None,
    keep: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    if not fits(hidden_RD, w_VD):
        return token_logprobs.reference(hidden_RD, w_VD, b_V, ids_R, multiplier, softcap, keep, temperature)
    _check(ids_R, w_VD.shape[0])
    shape = Shape(0.0 if multiplier == 1.0 else multiplier, softcap or 0.0, 0.0 if temperature == 1.0 else temperature)
    out: Tensor = _TokenLogprobs.apply(hidden_RD, w_VD, b_V, ids_R, shape, keep)
    return out


@logprobs_of.on("native", why="one pass in the order of the engine's scores", missing=native.missing, bits="own")
def _native_of(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    if logits_RV.device.type != "cpu" or logits_RV.dtype != torch.float32:
        return logprobs_of.reference(logits_RV, ids_R)
    _check(ids_R, logits_RV.shape[1])
    return with_reference_gradient(_forward_of, logprobs_of.reference, logits_RV, ids_R)


def _forward_of(logits_RV: Tensor, ids_R: Tensor) -> Tensor:
    x_RV, ids_R = _rows_as_they_lie(logits_RV), ids_R.to(torch.int64).contiguous()
    rows, out_R = ctypes.c_int32(len(ids_R)), torch.empty(len(ids_R))
    sums_R2, noted_R = torch.empty(len(ids_R), 2, dtype=torch.float64), torch.empty(len(ids_R))
    take = Likelihood(
        rows=ctypes.addressof(rows),
        width=x_RV.shape[1],
        last=1,
        x=x_RV.data_ptr(),
        x_stride=x_RV.stride(0),
        targets=ids_R.data_ptr(),
        sums=sums_R2.data_ptr(),
        logits=noted_R.data_ptr(),
        out=out_R.data_ptr(),
    )
    _run([take])
    return out_R


def _check(ids_R: Tensor, vocab: int) -> None:
    if len(ids_R) and not (int(ids_R.min()) >= 0 and int(ids_R.max()) < vocab):
        raise IndexError(f"an id is outside of the vocabulary, 0 to {vocab - 1}")


@dataclass(frozen=True, slots=True)
class Shape:
    """What is done to a score before it is a logit; 0: nothing."""

    multiplier: float
    softcap: float
    temperature: float


class Likelihood(Structure):
    """Takes logits of a piece of the vocabulary into each row's sum; the last piece gives log-probabilities."""

    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("first", c_int32),
        ("last", c_int32),
        ("multiplier", c_float),
        ("softcap", c_float),
        ("temperature", c_float),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("targets", c_void_p),
        ("sums", c_void_p),
        ("logits", c_void_p),
        ("out", c_void_p),
    )


class LikelihoodGradient(Structure):
    """Turns logits of a piece of the vocabulary into their gradient."""

    _fields_ = (
        ("rows", c_void_p),
        ("width", c_int32),
        ("first", c_int32),
        ("multiplier", c_float),
        ("softcap", c_float),
        ("temperature", c_float),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("targets", c_void_p),
        ("sums", c_void_p),
        ("upstream", c_void_p),
    )


class _Pieces:
    """The scores of some rows, a piece of the vocabulary at a time, in one buffer [R, B] or in one for all [R, V]."""

    def __init__(self, hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, ids_R: Tensor, shape: Shape) -> None:
        self.hidden_RD, self.w_VD = hidden_RD.detach().contiguous(), _rows_as_they_lie(w_VD.detach())
        self.b_V = None if b_V is None else b_V.detach().contiguous()
        self.ids_R, self.shape = ids_R.to(torch.int64).contiguous(), shape
        self.count = ctypes.c_int32(len(self.hidden_RD))
        self.sums_R2 = torch.empty(len(ids_R), 2, dtype=torch.float64)
        self.kept_RV: Tensor | None = None

    def forward(self, keep: bool) -> Tensor:
        """log p [R]; with `keep` the scores stay for `gradients`."""
        rows, vocab = len(self.hidden_RD), self.w_VD.shape[0]
        width = vocab if keep else self.width
        buffer_RB, noted_R, out_R = torch.empty(rows, width), torch.empty(rows), torch.empty(rows)
        program: list[Structure] = []
        for first, last in self._spans(width):
            score, take = self._score(first, last, buffer_RB), self._like(Likelihood, first, last, buffer_RB)
            take.last, take.logits, take.out = last == vocab, noted_R.data_ptr(), out_R.data_ptr()
            program += [score, take]
        _run(program)
        self.kept_RV = buffer_RB if keep else None
        return out_R

    def gradients(self, upstream_R: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last, gradient [R, last - first] of the scores) for each piece, good until the next is asked for."""
        vocab, upstream_R = self.w_VD.shape[0], upstream_R.float().contiguous()
        kept_RV, self.kept_RV = self.kept_RV, None
        width = self.width if kept_RV is None else vocab
        buffer_RB = torch.empty(len(self.hidden_RD), width) if kept_RV is None else kept_RV
        for first, last in self._spans(width):
            turn = self._like(LikelihoodGradient, first, last, buffer_RB)
            turn.upstream = upstream_R.data_ptr()
            _run([turn] if kept_RV is not None else [self._score(first, last, buffer_RB), turn])
            yield first, last, buffer_RB[:, : last - first]

    @property
    def width(self) -> int:
        """Columns of a piece: a multiple of PIECE_MULTIPLE, as many as make PIECE_NUMBERS."""
        each = PIECE_NUMBERS // max(1, len(self.hidden_RD)) // PIECE_MULTIPLE * PIECE_MULTIPLE
        return min(self.w_VD.shape[0], max(PIECE_MULTIPLE, each))

    def _spans(self, width: int) -> Iterator[tuple[int, int]]:
        vocab = self.w_VD.shape[0]
        return ((first, min(first + width, vocab)) for first in range(0, vocab, width))

    def _score(self, first: int, last: int, out_RB: Tensor) -> Structure:
        bias = None if self.b_V is None else self.b_V[first:last]
        return linear_stage(self.hidden_RD, self.w_VD[first:last], bias, out_RB, ctypes.addressof(self.count))

    def _like(self, kind: type[Structure], first: int, last: int, x_RB: Tensor) -> Any:
        return kind(
            rows=ctypes.addressof(self.count),
            width=last - first,
            first=first,
            multiplier=self.shape.multiplier,
            softcap=self.shape.softcap,
            temperature=self.shape.temperature,
            x=x_RB.data_ptr(),
            x_stride=x_RB.stride(0),
            targets=self.ids_R.data_ptr(),
            sums=self.sums_R2.data_ptr(),
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, ids_R: Tensor, shape: Shape, keep: bool
    ) -> Tensor:
        pieces = _Pieces(hidden_RD, w_VD, b_V, ids_R, shape)
        wanted = any(ctx.needs_input_grad)
        out_R = pieces.forward(keep and wanted)
        if wanted:
            ctx.save_for_backward(hidden_RD, w_VD)  # so that a change in place before backward is noticed
            ctx.keep, ctx.pieces, ctx.bias = keep, pieces, None if b_V is None else b_V.dtype
        return out_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, w_VD = ctx.saved_tensors
        hidden_RD = hidden_RD.detach()
        needs = ctx.needs_input_grad
        d_hidden_RD = torch.zeros_like(hidden_RD) if needs[0] else None
        sum_VD = _sum_so_far(w_VD) if ctx.keep and needs[1] else None
        d_w_VD = torch.empty_like(w_VD) if needs[1] and sum_VD is None else None
        d_b_V = torch.empty(w_VD.shape[0], dtype=ctx.bias) if ctx.bias and needs[2] else None
        for first, last, d_RB in ctx.pieces.gradients(grads[0]):
            if d_hidden_RD is not None:
                input_slopes(d_RB, w_VD[first:last], d_hidden_RD, add=True)
            if sum_VD is not None:
                weight_slopes(d_RB, hidden_RD, sum_VD[first:last], add=True)
            elif d_w_VD is not None:
                _products(d_w_VD[first:last], d_RB, hidden_RD)
            if d_b_V is not None:
                d_b_V[first:last] = d_RB.sum(0)
        return d_hidden_RD, d_w_VD, d_b_V, None, None, None


def _sum_so_far(w_VD: Tensor) -> Tensor | None:
    """The gradient that a weight has, where more can be added to it as it lies: no second one is held beside it."""
    watched = w_VD._backward_hooks or w_VD._post_accumulate_grad_hooks
    found = w_VD.grad if w_VD.is_leaf and not watched else None
    return found if found is not None and found.dtype == torch.float32 and found.is_contiguous() else None


def _products(out_BD: Tensor, d_RB: Tensor, hidden_RD: Tensor) -> None:
    """Scores' gradients ᵀ · hidden states; where the weight has fewer bits, some of the vocabulary at a time."""
    if out_BD.dtype == d_RB.dtype:
        weight_slopes(d_RB, hidden_RD, out_BD)
    else:
        for at, d_RS in _slices(d_RB):
            out_BD[at] = weight_slopes(d_RS, hidden_RD)


def _slices(d_RB: Tensor) -> Iterator[tuple[slice, Tensor]]:
    return ((slice(at, at + SLICE), d_RB[:, at : at + SLICE]) for at in range(0, d_RB.shape[1], SLICE))


def _rows_as_they_lie(w: Tensor) -> Tensor:
    return w if w.stride(-1) == 1 else w.contiguous()


def _run(program: list[Structure]) -> None:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    library.run(program, torch.get_num_threads())
