"""One product's adapters in slots that are filled anew between two steps, each at its own rank.

    x [T, K] ── A of q, k and v, one product ──▶ h [P, ranks] ── B of q, of k, of v ──▶ added to their rows of y [T, N]

A fused weight has parts (q, k, v), of which an adapter may have some. Their As lie one below the other, so a slot
is one matrix to shrink by and one for each part to expand by. What the stages read is written here, at addresses that
stay; an empty slot and a part without an adapter are matrices of no outputs.

Shapes: T tokens, K inputs, N outputs, P tokens that have an adapter, R ranks of all parts together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..core import ConfigError
from . import grouped_stages, stages
from .grouped import Places
from .linear import linear


class Part(NamedTuple):
    """Which part of a product, where its h begins, and B [n, rank] that makes that part's outputs of it."""

    number: int
    at: int
    b_NR: Tensor


class Pairs(NamedTuple):
    """One adapter of one product: A [R, K] of all its parts, the parts, and what their outputs are multiplied by."""

    a_RK: Tensor
    parts: tuple[Part, ...]
    scale: float

    @property
    def nbytes(self) -> int:
        return self.a_RK.nbytes + sum(part.b_NR.nbytes for part in self.parts)


class Slotted:
    """`count` slots beside one product of `inputs`, whose parts are `rows` of its outputs."""

    def __init__(self, count: int, inputs: int, rows: Sequence[slice]) -> None:
        self.inputs, self.rows = inputs, tuple(rows)
        self.held: list[Pairs | None] = [None] * count
        self._shrink = (grouped_stages.Matrix * count)()
        self._expand = (grouped_stages.Matrix * (count * len(self.rows)))()

    def put(self, slot: int, pairs: Pairs | None) -> None:
        """Fill a slot, or empty it.

        Raises:
            ConfigError: shapes that are not this product's.
        """
        each, blank = len(self.rows), grouped_stages.Matrix()
        if pairs is not None:
            self._check(pairs)
        self._shrink[slot] = blank
        for number in range(each):
            self._expand[slot * each + number] = blank
        self.held[slot] = pairs
        if pairs is None:
            return
        self._shrink[slot] = _matrix(pairs.a_RK)
        for number, at, b_NR in pairs.parts:
            made = _matrix(b_NR)
            made.scale, made.a_at, made.out_at = pairs.scale, at, self.rows[number].start
            self._expand[slot * each + number] = made

    def _check(self, pairs: Pairs) -> None:
        a_RK = pairs.a_RK
        for number, at, b_NR in pairs.parts:
            rows = self.rows[number]
            fits = b_NR.shape[0] == rows.stop - rows.start and at + b_NR.shape[1] <= a_RK.shape[0]
            if not fits or a_RK.shape[1] != self.inputs:
                raise ConfigError(
                    f"an adapter's A {list(a_RK.shape)} and B {list(b_NR.shape)} do not fit {self.inputs} inputs and "
                    f"outputs {rows.start} to {rows.stop}"
                )

    def stages_of(self, places: Places, x_TK: Tensor, shrunk_PR: Tensor, y_TN: Tensor) -> list[grouped_stages.Grouped]:
        """The stages that add to `y_TN`, in place, what the slots of `places` make of `x_TK`."""
        shrink = _stage(places, self._shrink, 1, x_TK, shrunk_PR)
        shrink.from_ = places.row_P.data_ptr()
        expand = _stage(places, self._expand, len(self.rows), shrunk_PR, y_TN)
        expand.to, expand.add = places.row_P.data_ptr(), True
        return [shrink, expand]

    def add(self, x_TK: Tensor, y_TN: Tensor, tokens: Sequence[tuple[int, Tensor]]) -> Tensor:
        """The same one kernel at a time: y with the adapter of each slot added for its tokens."""
        y_TN = y_TN.clone()
        for slot, token_P in tokens:
            pairs = self.held[slot]
            if pairs is None:
                continue
            shrunk_PR = linear(x_TK[token_P], pairs.a_RK)
            for number, at, b_NR in pairs.parts:
                added_PN = linear(shrunk_PR[:, at : at + b_NR.shape[1]], b_NR) * pairs.scale
                y_TN[:, self.rows[number]].index_add_(0, token_P, added_PN.to(y_TN.dtype))
        return y_TN


def _matrix(w: Tensor) -> grouped_stages.Matrix:
    return grouped_stages.Matrix(
        w=w.data_ptr(), stride=w.stride(0), n=w.shape[0], k=w.shape[1], type=stages.TYPES.get(w.dtype, 0), scale=1.0
    )


def _stage(
    places: Places, matrices: ctypes.Array[grouped_stages.Matrix], parts: int, a: Tensor, out: Tensor
) -> grouped_stages.Grouped:
    return grouped_stages.Grouped(
        groups=places.groups,
        act=stages.ACTS["none"],
        parts=parts,
        matrices=ctypes.addressof(matrices),
        first=places.first_G.data_ptr(),
        a=a.data_ptr(),
        a_stride=a.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
    )
