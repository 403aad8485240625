"""Safetensors files: checked whole before use, read straight into place or through a memory map, written one at a time.

    8 bytes   length of the header, little-endian
    header    JSON: name -> {dtype, shape, data_offsets [begin, end)}, and __metadata__
    data      the tensors' bytes, without holes

Tensors that lie in memory as they lie in the file are read there by several threads, each a piece at a time. The others
are views of the map; their pages are given back to the system once they have been copied. Either way reading a file of
100 GB costs the memory of its largest tensor at most.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..platforms import usable_cores

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_LIMIT = 100 << 20
PIECE = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Where one tensor lies: bytes `begin` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """One safetensors file, mapped; `entries` is known and checked as soon as it is open.

    Raises:
        CheckpointError: the file is missing, truncated, overlapping, holed or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self.entries = _entries(path, os.fstat(self._file).st_size, partial(os.read, self._file))
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None

    def tensor(self, name: str) -> Tensor:
        """A tensor as a view of the map, to be read only: no copy, valid as long as it is held."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            if entry.begin % entry.dtype.itemsize == 0:
                flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.begin)
            else:
                raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin)
                flat = raw.clone().view(entry.dtype)
        return flat.view(entry.shape)

    def read_into(self, places: Mapping[str, Tensor]) -> None:
        """Read tensors straight into their places: contiguous, on the CPU, each of its tensor's dtype and shape.

        Several threads read, since one alone moves no more than a third of what memory can take.

        Raises:
            CheckpointError: the file cannot be read to its end.
        """
        pieces: list[tuple[int, memoryview]] = []
        for name, place in places.items():
            begin, raw = self.entries[name].begin, place.view(-1).view(torch.uint8).numpy().data
            pieces += [(begin + at, raw[at : at + PIECE]) for at in range(0, len(raw), PIECE)]
        with ThreadPoolExecutor(usable_cores()) as pool:
            for _ in pool.map(self._read, pieces):
                pass

    def _read(self, piece: tuple[int, memoryview]) -> None:
        at, room = piece
        while room:
            try:
                count = os.preadv(self._file, [room], at)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from None
            if not count:
                raise CheckpointError(f"{self.path} ended at byte {at} while it was read; copy or download it again")
            at, room = at + count, room[count:]

    def release(self, name: str) -> None:
        """Give the pages under a tensor back; touching it again reads the file again."""
        entry = self.entries[name]
        start = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.end - start)


def _entries(path: Path, size: int, read: Callable[[int], bytes]) -> dict[str, Entry]:
    def broken(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: {why}; copy or download it again")

    if size < 8:
        raise broken(f"{size} bytes cannot hold a header")
    length = int.from_bytes(read(8), "little")
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise broken(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise broken("its header is not a table")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {}
    for name, item in header.items():
        try:
            entries[name] = _entry(item, start)
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"tensor '{name}': {error}") from None
    expected = start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != expected:
            raise broken(f"tensor '{name}' begins at byte {entry.begin}, not {expected}")
        expected = entry.end
    if expected != size:
        raise broken(f"it has {size} bytes and its header describes {expected}")
    return entries


def _entry(item: Any, start: int) -> Entry:
    if item["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {item['dtype']!r}")
    dtype = DTYPES[item["dtype"]]
    shape = tuple(item["shape"])
    begin, end = item["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("its shape and offsets must be whole numbers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for shape {list(shape)} of {item['dtype']}")
    return Entry(dtype=dtype, shape=shape, begin=start + begin, end=start + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A tensor to be written: what the header says now, and the values when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]
    source: str = ""
    """The decoder's parameter that the values are made of."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(path: Path, tensors: Iterable[Pending]) -> None:
    """Write one safetensors file under a temporary name and rename it; holds one tensor at a time."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in tensors:
        header[item.name] = {
            "dtype": NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in tensors:
            flat = item.values().detach().to(device="cpu", dtype=item.dtype).contiguous().view(-1)
            raw = flat.view(torch.uint8)
            for begin in range(0, raw.numel(), PIECE):
                file.write(raw[begin : begin + PIECE].numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
