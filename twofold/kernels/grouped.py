"""Rows dealt to groups, each group multiplied by its own matrix: what a mixture's experts and a batch's adapters share.

    chosen   2 0 | 0 3 | 2 0      first   0 3 3 5 6        group g has places first[g] to first[g + 1] - 1,
    (row 0)  (1)   (2)            row     0 1 2 0 2 1      in the order of its rows

Shapes: T rows, C choices of a row, G groups, P places (at most T x C), N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core import ConfigError
from . import grouped_stages, native, stages
from .panels import Rounding, panels_of, quantize_stage, wide_gate

if TYPE_CHECKING:
    from .quantized import Packed


class Places:
    """Where a Deal stage writes who goes where, for at most `rows` rows of `choices` each."""

    def __init__(self, rows: int, choices: int, groups: int) -> None:
        self.choices, self.groups = choices, groups
        self.first_G = torch.empty(groups + 1, dtype=torch.int32)
        self.row_P, self.pair_P, self.places_TC = (torch.empty(rows * choices, dtype=torch.int32) for _ in range(3))

    @property
    def count(self) -> int:
        """The address of how many places there are, as a stage reads it."""
        return self.first_G[self.groups :].data_ptr()

    def deal(self, chosen_TC: Tensor, rows: int) -> grouped_stages.Deal:
        """The stage that fills these from `chosen_TC` (int32, contiguous); `rows` is the address of the row count."""
        return grouped_stages.Deal(
            rows=rows,
            groups=self.groups,
            choices=self.choices,
            chosen=chosen_TC.data_ptr(),
            first=self.first_G.data_ptr(),
            row=self.row_P.data_ptr(),
            pair=self.pair_P.data_ptr(),
            places=self.places_TC.data_ptr(),
        )


class Matrices:
    """The groups' matrices [N, K], which may differ in all but their kind: fp32 or bf16, or quantized in panels.

    Keeps them alive. `gated` ones have 2N rows; `scales` are what a scattered product is multiplied by.
    """

    def __init__(
        self, matrices: Sequence[Tensor] | Sequence[Packed], *, gated: bool = False, scales: Sequence[float] = ()
    ) -> None:
        self._kept = [m.contiguous() if isinstance(m, Tensor) and m.stride(-1) != 1 else m for m in matrices]
        self._array = (grouped_stages.Matrix * len(self._kept))()
        for i, matrix in enumerate(self._kept):
            self._array[i] = _matrix(matrix, gated, scales[i] if scales else 1.0)
        first = self._kept[0]
        self._packed = None if isinstance(first, Tensor) else first
        # Gates and ups whose panels overlap are multiplied as one and opened afterwards.
        self._apart = bool(gated and self._packed and self._array[0].n % 16)
        self._gated = gated and not self._apart
        for number in range(len(self._array) if self._apart else 0):
            self._array[number].n *= 2

    def stages_of(
        self,
        places: Places,
        a: Tensor,
        out: Tensor,
        rows: int,
        rounding: Rounding,
        *,
        act: str = "none",
        gather: bool = False,
        scatter: bool = False,
    ) -> list[ctypes.Structure]:
        """The stages of one product for each place.

        Rows of `a` and `out` are places, or with `gather` (of a) and `scatter` (added to out, scaled) the places' rows;
        `rows` is the address of how many `a` has. `rounding` is memory for as many rows as `a` or `out` may have.
        """
        target = rounding.wide(self._array[0].n) if self._apart else out
        product = grouped_stages.Grouped(
            groups=len(self._array),
            act=stages.ACTS["none" if self._apart else act],
            gated=self._gated,
            add=scatter,
            parts=1,
            matrices=ctypes.addressof(self._array),
            first=places.first_G.data_ptr(),
            from_=places.row_P.data_ptr() if gather else None,
            to=places.row_P.data_ptr() if scatter else None,
            out=target.data_ptr(),
            out_stride=target.stride(0),
        )
        made: list[ctypes.Structure] = [product]
        if self._packed is not None and self._packed.dynamic:
            rounded = quantize_stage(a, self._packed, rows, rounding)
            product.rounded, made = rounded.out, [rounded, product]
        else:
            product.a, product.a_stride = a.data_ptr(), a.stride(0)
        if self._apart:
            made.append(wide_gate(target, out, places.count, act))
        return made


def _matrix(matrix: Tensor | Packed, gated: bool, scale: float) -> grouped_stages.Matrix:
    if not isinstance(matrix, Tensor):
        return grouped_stages.Matrix(
            n=matrix.n // 2 if gated else matrix.n, k=matrix.k, scale=scale, panels=panels_of(matrix)
        )
    return grouped_stages.Matrix(
        w=matrix.data_ptr(),
        stride=matrix.stride(0),
        n=matrix.shape[0] // 2 if gated else matrix.shape[0],
        k=matrix.shape[1],
        type=stages.TYPES[matrix.dtype],
        scale=scale,
    )


def choices_of(chosen: Tensor, groups: int, what: str, least: int = 0) -> Tensor:
    """`chosen` as the kernels read it, int32 and contiguous.

    Raises:
        ConfigError: a choice that is none of the groups, which a kernel would follow out of memory.
    """
    if chosen.numel() and not least <= int(chosen.min()) <= int(chosen.max()) < groups:
        raise ConfigError(
            f"{what} {int(chosen.min())} to {int(chosen.max())} were chosen; there are {groups}: "
            f"choose from {least} to {groups - 1}"
        )
    return chosen.to(torch.int32).contiguous()


def present(chosen: Tensor) -> list[int]:
    """The groups that anyone chose, in order; a negative choice is none."""
    return [group for group in chosen.unique().tolist() if group >= 0]


def run(*written: ctypes.Structure) -> None:
    """Run stages one after another on the native kernels."""
    library = native.library()
    assert library is not None, "asked for only where it is there"
    library.run(stages.program(*written), torch.get_num_threads())


def in_lines(x: Tensor) -> Tensor:
    """x with neighbours of a row side by side, as the kernels want it."""
    return x if x.stride(-1) == 1 else x.contiguous()
