"""Format: one way to write weights as whole numbers, which knows its bytes, its arithmetic, its panels and its cuts.

    format = named("int4-g64")
    quantized = format.quantize(w_NK)              codes, scales, zeros
    y_TN = format.multiply(x_TK, quantized)        the definition of the product
    packed = format.pack(quantized)                what the kernels read

Shapes: T tokens, K inputs, N outputs, G groups; experts have one more dimension in front of N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..core import ConfigError, Registry
from ..kernels import quantized as kernel
from ..kernels.quantized import Packed, by_groups
from .codes import Quantized, round_to, scales
from .names import MEANING, READ_GROUPS, Meaning, short

SCALES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PIECE = 1 << 22  # numbers that are rounded at once, so that a large table needs little room beside itself
FP8_MOST = 448  # the largest e4m3 number
LONGEST = 2**31 // (127 * 255) // 2  # inputs of one group whose products still add up in 32 bits, with room to spare


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Codes of `bits`, a scale for each output and `group` of inputs (0: one for all inputs), zeros unless `symmetric`.

    With `activations` "int8" these are rounded by row and group as they come, and the product is of whole numbers;
    with "float" the weights are widened. `scale` is the dtype of scales. `numbers` "fp8": codes are e4m3 numbers.
    `tensor`: all scales of a matrix are equal. `offset`: zeros are fp32 and added. `ordered`: groups are of inputs in
    another order than theirs, which the weight keeps (GPTQ's desc_act).

    Raises:
        ConfigError: a width, group or dtype that there is not.
    """

    bits: Literal[8, 4]
    group: int = 0
    symmetric: bool = True
    activations: Literal["int8", "float"] = "int8"
    scale: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    numbers: Literal["int", "fp8"] = "int"
    tensor: bool = False
    offset: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        for what, given, allowed in (
            ("bits", self.bits, (8, 4)),
            ("group", self.group, READ_GROUPS),
            ("activations", self.activations, ("int8", "float")),
            ("scale", self.scale, tuple(SCALES)),
            ("numbers", self.numbers, ("int", "fp8")),
        ):
            if given not in allowed:
                raise ConfigError(f"a number format's {what} must be {' or '.join(map(str, allowed))}, not {given}")
        floats = self.numbers == "fp8"
        if floats and (self.bits != 8 or not self.symmetric):
            raise ConfigError("e4m3 numbers have 8 bits and no zeros")
        if self.dynamic and (floats or self.offset or self.group == 16):
            raise ConfigError(f"{self.name}: only float activations go with e4m3 numbers, offsets and groups of 16")
        if (self.offset and self.symmetric) or (self.tensor and self.group):
            raise ConfigError(f"{self.name}: an offset is a zero, and one scale a matrix leaves no groups")

    # ---------------------------------------------------------------------------------------- what it is
    @property
    def name(self) -> str:
        kind = self.numbers if self.numbers == "fp8" else f"int{self.bits}"
        return Meaning(kind, self.group, self.symmetric, self.dynamic, self.tensor, self.offset).name

    @property
    def dynamic(self) -> bool:
        """Whether activations are rounded to int8 as they come."""
        return self.activations == "int8"

    @property
    def least(self) -> int:
        if self.numbers == "fp8":
            return -FP8_MOST
        return 0 if self.bits == 4 else -127 if self.symmetric else -128

    @property
    def most(self) -> int:
        if self.numbers == "fp8":
            return FP8_MOST
        return 15 if self.bits == 4 else 127

    @property
    def idle(self) -> int:
        """The zero of symmetric codes."""
        return 8 if self.bits == 4 else 0

    @property
    def code_dtype(self) -> torch.dtype:
        if self.numbers == "fp8":
            return torch.float8_e4m3fn
        return torch.uint8 if self.bits == 4 else torch.int8

    @property
    def zero_dtype(self) -> torch.dtype:
        return torch.float32 if self.offset else self.code_dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALES[self.scale]

    def groups(self, k: int) -> int:
        return -(-k // self.group) if self.group else 1

    def bytes(self, n: int, k: int) -> int:
        """What a weight of [n, k] takes in panels, all that is filled up counted."""
        rows, groups = n + -n % kernel.LANES, self.groups(k)
        inputs = k + -k % (self.group or kernel.EVEN)
        each = self.scale_dtype.itemsize + (0 if self.symmetric else self.zero_dtype.itemsize)
        return rows * (inputs * self.bits // 8 + groups * each) + (4 * k if self.ordered else 0)

    def describe(self) -> str:
        """One line: the name, what it means, and the bits that a weight takes in the long run."""
        groups = f"groups of {self.group}" if self.group else f"one scale {'a matrix' if self.tensor else 'an output'}"
        zeros = "symmetric" if self.symmetric else "with offsets" if self.offset else "with zeros"
        acts = (
            f"int8 activations by {'row and group' if self.group else 'row'}" if self.dynamic else "float activations"
        )
        bits = 8 * self.bytes(kernel.LANES, 2**14) / (kernel.LANES * 2**14)
        return f"{self.name}: {groups}, {zeros}, {self.scale} scales, {acts}, {bits:.2f} bits a weight"

    # ---------------------------------------------------------------------------------------- there and back
    def quantize(self, w_NK: Tensor, importance_K: Tensor | None = None) -> Quantized:
        """Round to nearest. With `importance` (each input's mean square), scales may clip where that loses less.

        Raises:
            ConfigError: weights that are not finite, or more inputs than one group may have.
        """
        k = w_NK.shape[-1]
        self._check(k)
        lead, groups = w_NK.shape[:-1], self.groups(k)
        codes_NK = torch.empty(w_NK.shape, dtype=self.code_dtype)
        scale_NG = torch.empty(*lead, groups, dtype=self.scale_dtype)
        zero_NG = None if self.symmetric else torch.empty(*lead, groups, dtype=self.zero_dtype)
        importance_Gk = by_groups(importance_K.float(), self.group) if importance_K is not None else None
        rows = max(1, PIECE // max(1, k))
        one = self.one_scale(w_NK) if self.tensor else None
        for first in range(0, math.prod(lead), rows):
            some = slice(first, first + rows)
            w_NGk = by_groups(w_NK.flatten(0, -2)[some].float(), self.group)
            if not bool(torch.isfinite(w_NGk).all()):
                raise ConfigError("weights that are not finite cannot be quantized: the checkpoint is damaged")
            scale, zero = scales(w_NGk, self, importance_Gk) if one is None else one
            if one is not None:
                scale = scale.reshape(-1, 1)[some]
                zero = None if zero is None else zero.reshape(-1, 1)[some]
            scale_NG.view(-1, groups)[some] = scale
            if zero_NG is not None and zero is not None:
                zero_NG.view(-1, groups)[some] = zero
            codes_NK.view(-1, k)[some] = round_to(w_NGk, scale, zero, self).flatten(-2)[:, :k]
        return Quantized(codes_NK, scale_NG, zero_NG, self)

    def one_scale(self, w_NK: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and zero of each whole matrix, for all of its outputs [..., N, 1]: by its least and its largest."""
        low, high = (find(w_NK, (-2, -1), keepdim=True).float() for find in (torch.amin, torch.amax))
        ends = torch.cat((low, high), -1).expand(*w_NK.shape[:-1], 2)
        return scales(ends[..., None, :], self)

    def _check(self, k: int) -> None:
        if self.dynamic and not self.group and k > LONGEST:
            raise ConfigError(f"{self.name}: {k} inputs under one scale, at most {LONGEST} can be: use a group of 128")

    def dequantize(self, quantized: Quantized) -> Tensor:
        """The weights that the codes stand for, fp32 [N, K]."""
        return quantized.dequantize()

    def multiply(self, x_TK: Tensor, quantized: Quantized, b_N: Tensor | None = None) -> Tensor:
        """x Wᵀ + b in fp32, bit for bit what every kernel must give."""
        return kernel.multiply(x_TK, quantized.logical, self.group, self.dynamic, b_N)

    def pack(self, quantized: Quantized) -> Packed:
        """As the kernels read it (`kernels/quantized.py` draws the panels)."""
        return quantized.pack()

    def unpack(self, packed: Packed) -> Quantized:
        """Panels back into codes."""
        return Quantized(*kernel.unpack(packed), self)

    @property
    def in_turn(self) -> Format:
        """The same format of weights whose inputs are in the order of their groups."""
        return replace(self, ordered=False)

    def empty(self, *shape: int, device: torch.device | str = "cpu") -> Packed:
        """Panels of a weight of `shape` ([experts,] n, k) with nothing in them yet."""
        *lead, n, k = shape
        self._check(k)
        panels, inputs = -(-n // kernel.LANES), k + -k % (self.group or kernel.EVEN)
        tile = (inputs // 4, kernel.LANES, 4) if self.bits == 8 else (inputs // 8, kernel.LANES, 4)
        each = (*lead, panels, self.groups(k), kernel.LANES)
        return Packed(
            codes=torch.empty(*lead, panels, *tile, dtype=self.code_dtype, device=device),
            scales=torch.empty(each, dtype=self.scale_dtype, device=device),
            zeros=None if self.symmetric else torch.empty(each, dtype=self.zero_dtype, device=device),
            n=n,
            k=k,
            group=self.group,
            dynamic=self.dynamic,
        )

    # ---------------------------------------------------------------------------------------- cuts
    def cut(self, quantized: Quantized, dim: int, rank: int, ranks: int) -> Quantized:
        """The part of one of `ranks` equal workers: outputs (`dim` 0), or inputs at the borders of groups (`dim` 1).

        Raises:
            ConfigError: parts that would not be equal or would split a group; the message has the nearest that work.
        """
        n, k = quantized.shape[-2:]
        size, step = (n, 1) if dim == 0 else (k, self.group or 1)
        if size % (ranks * step):
            legal = [r for r in range(1, size // step + 1) if size % (r * step) == 0]
            close = sorted(sorted(legal, key=lambda r: abs(math.log(r / ranks)))[:2])
            what = f"{size} outputs" if dim == 0 else f"{size} inputs in groups of {step}"
            raise ConfigError(f"{what} cannot be cut in {ranks} equal parts: use {' or '.join(map(str, close))}")
        part = slice(size // ranks * rank, size // ranks * (rank + 1))
        if dim == 0:
            rows = quantized.zero[..., part, :] if quantized.zero is not None else None
            return Quantized(quantized.codes[..., part, :], quantized.scale[..., part, :], rows, self)
        held = slice(part.start // step, part.stop // step) if self.group else slice(None)
        zero = quantized.zero[..., held] if quantized.zero is not None else None
        return Quantized(quantized.codes[..., part], quantized.scale[..., held], zero, self)


FORMATS: Registry[Format] = Registry("number format")
"""Every format that has a name."""

for _name, _meaning in MEANING.items():
    FORMATS.register(_name)(
        Format(
            bits=4 if _meaning.kind == "int4" else 8,
            group=_meaning.group,
            symmetric=_meaning.symmetric,
            activations="int8" if _meaning.dynamic else "float",
            numbers="fp8" if _meaning.kind == "fp8" else "int",
            tensor=_meaning.tensor,
        )
    )


def named(name: str) -> Format:
    """The format of a name; "int4-g32" is understood as "int4" is.

    Raises:
        ConfigError: no such name; the message has the nearest.
    """
    return FORMATS[short(name)]
