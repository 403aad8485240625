"""GGUF's blocks of weights (llama.cpp's k-quants and their kin), as codes with scales that mean exactly the same.

    Q4_0  d·(q − 8)            Q2_K  (d·s)·q − (e·m)    16 inputs, s and m of 4 bits     IQ4_NL  d·table[q]
    Q4_1  d·q + m              Q3_K  (d·s)·(q − 4)      16 inputs, s of 6 bits
    Q5_0  d·(q − 16)           Q4_K  (d·s)·q − (e·m)    32 inputs, s and m of 6 bits
    Q5_1  d·q + m              Q5_K  the same, q of 5 bits
    Q8_0  d·q                  Q6_K  (d·s)·(q − 32)     16 inputs, s of 8 bits

d, e and m are fp16; d·s has at most 19 bits and d·s·q 24, so both are exact in fp32 and a weight is rounded once, where
an offset is added. Codes of 5 and 6 bits take 8 here, and scales of k-quants fp32: wider in memory than in the file.

Shapes: N outputs, K inputs, B blocks of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import CheckpointError
from .codes import Quantized
from .format import Format
from .stored import Find, Part, Stored, nothing_to_say, refused

Decoded = tuple[Tensor, Tensor, Tensor | None]
"""Codes [N, B, inputs], scales and offsets [N, B, groups]."""

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(raw_NB2: Tensor) -> Tensor:
    return raw_NB2.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """All low halves, then all high ones."""
    return torch.cat((raw & 15, raw >> 4), -1)


def _fields(raw: Tensor, run: int, bits: int) -> Tensor:
    """Runs of `run` bytes: of each run the lowest `bits` of all its bytes, then the next."""
    runs = raw.unflatten(-1, (-1, 1, run))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    fields: Tensor = runs >> shifts & ((1 << bits) - 1)
    return fields.flatten(-3)


def _q4_0(raw: Tensor) -> Decoded:
    return _nibbles(raw[..., 2:]), _half(raw[..., :2]), None


def _q4_1(raw: Tensor) -> Decoded:
    return _nibbles(raw[..., 4:]), _half(raw[..., :2]), _half(raw[..., 2:4])


def _fifth(raw: Tensor) -> Tensor:
    """Thirty-two bits, the first in the lowest place, as what they add to a code."""
    return _fields(raw.unflatten(-1, (4, 1)), 1, 1).flatten(-2) << 4


def _q5_0(raw: Tensor) -> Decoded:
    codes = _nibbles(raw[..., 6:]) | _fifth(raw[..., 2:6])
    return codes.to(torch.int8) - 16, _half(raw[..., :2]), None


def _q5_1(raw: Tensor) -> Decoded:
    codes = _nibbles(raw[..., 8:]) | _fifth(raw[..., 4:8])
    return codes.to(torch.int8), _half(raw[..., :2]), _half(raw[..., 2:4])


def _q8_0(raw: Tensor) -> Decoded:
    return raw[..., 2:].contiguous().view(torch.int8), _half(raw[..., :2]), None


def _iq4_nl(raw: Tensor) -> Decoded:
    table = torch.tensor(IQ4, dtype=torch.int8)
    return table[_nibbles(raw[..., 2:]).long()], _half(raw[..., :2]), None


def _q2_k(raw: Tensor) -> Decoded:
    d, e = _half(raw[..., 80:82]), _half(raw[..., 82:84])
    return _fields(raw[..., 16:80], 32, 2), d * (raw[..., :16] & 15), -(e * (raw[..., :16] >> 4))


def _q3_k(raw: Tensor) -> Decoded:
    high, low = _fields(raw[..., :32], 32, 1), _fields(raw[..., 32:96], 32, 2)
    packed, d = raw[..., 96:108], _half(raw[..., 108:110])
    scale = _nibbles(packed[..., :8]) | _fields(packed[..., 8:], 4, 2) << 4
    return (low | high << 2).to(torch.int8) - 4, d * (scale.to(torch.int8) - 32), None


def _scales_and_mins(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight mins of six bits, in twelve bytes."""
    a, b, c = raw.split(4, -1)
    return torch.cat((a & 63, c & 15 | a >> 2 & 48), -1), torch.cat((b & 63, c >> 4 | b >> 2 & 48), -1)


def _q4_k(raw: Tensor) -> Decoded:
    scale, least = _scales_and_mins(raw[..., 4:16])
    return _fields(raw[..., 16:], 32, 4), _half(raw[..., :2]) * scale, -(_half(raw[..., 2:4]) * least)


def _q5_k(raw: Tensor) -> Decoded:
    scale, least = _scales_and_mins(raw[..., 4:16])
    codes = _fields(raw[..., 48:], 32, 4) | _fields(raw[..., 16:48], 32, 1) << 4
    return codes.to(torch.int8), _half(raw[..., :2]) * scale, -(_half(raw[..., 2:4]) * least)


def _q6_k(raw: Tensor) -> Decoded:
    codes = _fields(raw[..., :128], 64, 4) | _fields(raw[..., 128:192], 32, 2) << 4
    scale = raw[..., 192:208].contiguous().view(torch.int8)
    return codes.to(torch.int8) - 32, _half(raw[..., 208:210]) * scale, None


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of block: its `inputs`, its `bytes`, and what its codes become."""

    inputs: int
    bytes: int
    bits: Literal[8, 4]
    group: int
    decode: Callable[[Tensor], Decoded]
    offset: bool = False

    @property
    def format(self) -> Format:
        return Format(
            bits=self.bits,
            group=self.group,
            symmetric=not self.offset,
            offset=self.offset,
            activations="float",
            scale="float16" if self.inputs == 32 else "float32",
        )


KINDS = {
    "Q4_0": Kind(32, 18, 4, 32, _q4_0),
    "Q4_1": Kind(32, 20, 4, 32, _q4_1, offset=True),
    "Q5_0": Kind(32, 22, 8, 32, _q5_0),
    "Q5_1": Kind(32, 24, 8, 32, _q5_1, offset=True),
    "Q8_0": Kind(32, 34, 8, 32, _q8_0),
    "Q2_K": Kind(256, 84, 4, 16, _q2_k, offset=True),
    "Q3_K": Kind(256, 110, 8, 16, _q3_k),
    "Q4_K": Kind(256, 144, 4, 32, _q4_k, offset=True),
    "Q5_K": Kind(256, 176, 8, 32, _q5_k, offset=True),
    "Q6_K": Kind(256, 210, 8, 16, _q6_k),
    "IQ4_NL": Kind(32, 18, 8, 32, _iq4_nl),
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight as blocks of one kind: rows of bytes under the weight's own name."""

    kind: str

    @property
    def format(self) -> Format:
        return KINDS[self.kind].format

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        kind = KINDS[self.kind]
        return {"codes": Part(name, (n, -(-k // kind.inputs) * kind.bytes), (torch.uint8,))}

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        kind = KINDS[self.kind]
        codes, scale, offset = kind.decode(parts["codes"].contiguous().view(n, -1, kind.bytes))
        if not bool(torch.isfinite(scale).all()) or (offset is not None and not bool(torch.isfinite(offset).all())):
            raise CheckpointError("a block's scale is not finite: the file is damaged")
        zero_NG = None if offset is None else offset.flatten(1).contiguous()
        scale_NG = scale.flatten(1).to(kind.format.scale_dtype).contiguous()
        return Quantized(codes.flatten(1)[:, :k].contiguous(), scale_NG, zero_NG, kind.format)

    spare = staticmethod(nothing_to_say)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Matrices that are multiplied as one and lie on disk in several ways; `format` holds all of them exactly."""

    format: Format
    ways: Mapping[str, Stored]

    def of(self, name: str) -> Stored:
        """How the weight of this name lies there."""
        return self.ways[name]

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        return self.ways[name].parts(name, n, k)

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        raise CheckpointError("several ways to lie on disk are read one by one")

    spare = staticmethod(nothing_to_say)


def together(ways: Mapping[str, Stored]) -> Stored:
    """How these weights lie on disk, which the decoder has as one: in one way, or each in its own."""
    every = list(ways.values())
    return every[0] if all(stored == every[0] for stored in every) else Mixed(_widest(every), ways)


def _widest(every: Sequence[Stored]) -> Format:
    """A format that holds those of several kinds of blocks."""
    formats = [stored.format for stored in every]
    if len(set(formats)) == 1:
        return formats[0]
    offset = any(format.offset for format in formats)
    scales = {format.scale for format in formats}
    return replace(
        formats[0],
        bits=8,
        group=min(format.group for format in formats),
        symmetric=not offset,
        offset=offset,
        scale=scales.pop() if len(scales) == 1 else "float32",
    )


def gguf_config(told: Mapping[str, Any], modules: Iterable[str], find: Find) -> tuple[dict[str, Blocks], Blocks | None]:
    """The kind of each of these modules, as `types` says, and of the embedding.

    Raises:
        CheckpointError: a kind of blocks that is not read.
    """
    types = told.get("types")
    if not isinstance(types, dict) or set(told) - {"quant_method", "types", "embedding"}:
        raise refused("GGUF", "types", types, f"in {', '.join(KINDS)}, as a table of kinds by name")
    for kind in types.values():
        if kind not in KINDS:
            raise refused("GGUF", "types", kind, f"in {', '.join(KINDS)}")
    found = {module: Blocks(types[f"{module}.weight"]) for module in modules if f"{module}.weight" in types}
    embedding = types.get(told.get("embedding"))
    return found, Blocks(embedding) if embedding else None
