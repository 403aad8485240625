"""A GGUF file: what it says of itself, and where its tensors lie. Nothing in it is trusted.

"GGUF"  version  tensors  entries      4 + 4 + 8 + 8 bytes, little-endian
entries     name, kind, value           strings and arrays begin with their length
tensors     name, dimensions (fastest first), kind, offset
data        from the next multiple of general.alignment on
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from ...quant.blocks import KINDS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_ENTRIES, MOST_TENSORS, MOST_DIMS = 1 << 16, 1 << 20, 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    30: "BF16",
}
"""The kinds of tensors that are read, by number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lying:
    """One tensor: its kind, its shape (slowest dimension first) and the bytes `begin` to `end` of the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """`meta` is what the file says of itself, `tensors` where they lie; both are read and checked at once.

    Raises:
        CheckpointError: no GGUF file, a damaged or cut one, one of several parts, or a kind of tensor that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        self._at = 0
        try:
            self._read()
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise self._broken(f"its header ends early or is not text ({error})") from None
        finally:
            self._map.close()

    def _read(self) -> None:
        if self._bytes(4) != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file")
        version, tensors, entries = self._numbers("IQQ")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; Twofold reads {VERSIONS[0]} and {VERSIONS[1]}"
            )
        if entries > MOST_ENTRIES or tensors > MOST_TENSORS:
            raise self._broken(f"{entries} entries and {tensors} tensors")
        self.meta: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            (kind,) = self._numbers("I")
            if key in self.meta:
                raise self._broken(f"'{key}' is there twice")
            self.meta[key] = self._value(kind)
        if self.meta.get("split.count", 1) > 1:
            raise CheckpointError(f"{self.path} is one of {self.meta['split.count']} parts: merge them with gguf-split")
        told = [self._tensor() for _ in range(tensors)]
        alignment = self.meta.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise self._broken(f"an alignment of {alignment!r}")
        data = -(-self._at // alignment) * alignment
        self.tensors: dict[str, Lying] = {}
        for name, kind, shape, offset in told:
            size = _bytes_of(kind, shape)
            if name in self.tensors or offset % alignment or data + offset + size > len(self._map):
                raise self._broken(f"tensor '{name}' is there twice, or ends behind the file")
            begin = data + offset
            self.tensors[name] = Lying(kind=kind, shape=shape, begin=begin, end=begin + size)

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._string()
        (count,) = self._numbers("I")
        if not 1 <= count <= MOST_DIMS:
            raise self._broken(f"tensor '{name}' of {count} dimensions")
        *dims, number, offset = self._numbers("Q" * count + "IQ")
        if number not in TYPES:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' is of kind {number}; Twofold reads {', '.join(TYPES.values())}"
            )
        kind = TYPES[number]
        if kind in KINDS and dims[0] % KINDS[kind].inputs:
            raise self._broken(f"tensor '{name}' has {dims[0]} inputs in blocks of {KINDS[kind].inputs}")
        return name, kind, tuple(reversed(dims)), offset

    # ------------------------------------------------------------------------------------------------- values
    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            (value,) = self._numbers(SCALARS[kind])
            return _shortest(value) if SCALARS[kind] == "f" else value
        if kind != ARRAY:
            raise self._broken(f"a value of kind {kind}")
        inner, count = self._numbers("IQ")
        if inner == STRING:
            if count > len(self._map) // 8:
                raise self._broken(f"a list of {count} texts")
            return [self._string() for _ in range(count)]
        if inner not in SCALARS or count > len(self._map):
            raise self._broken(f"a list of {count} values of kind {inner}")
        return list(self._numbers(f"{count}{SCALARS[inner]}"))

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        return self._bytes(length).decode("utf-8")

    def _numbers(self, what: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + what, self._map, self._at)
        self._at += struct.calcsize("<" + what)
        return found

    def _bytes(self, length: int) -> bytes:
        if length > len(self._map) - self._at:
            raise self._broken(f"{length} bytes at byte {self._at} of {len(self._map)}")
        self._at += length
        return self._map[self._at - length : self._at]

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {why}; copy or download it again")


def _shortest(value: float) -> float:
    """The shortest decimal that has these bits in fp32: what a config.json said before it was rounded."""
    for digits in range(5, 9):
        short = float(f"{value:.{digits}g}")
        if math.isfinite(value) and abs(short) < 3e38 and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * PLAIN[kind] if kind in PLAIN else count // KINDS[kind].inputs * KINDS[kind].bytes
