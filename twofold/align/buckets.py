"""Buckets: named tensors as a few flat runs of bytes, so that a model moves in pieces of 256 MiB and not by the tensor.

    tensors    a bf16   b bf16   bias fp32   c bf16
    bucket 0   │ a ····│ b ·│          bf16, up to the limit; each tensor begins at a line of the cache
    bucket 1   │ c ··│                 bf16
    bucket 2   │ bias │                fp32

The layout is a function of names, shapes and dtypes alone. Both ends compute it, and compare fingerprints.
(Sending tensor by tensor was the first cost of weight sync in verl#2418 and slime: 7 to 10 times.)
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from ..core import CheckpointError
from ..models.shards import NAMES

LIMIT = 256 << 20
LINE = 64
LANES = 4096
"""Numbers of 8 bytes in a row of the checksum."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's bytes `begin` to `end` of its bucket."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of one dtype that travel together."""

    dtype: torch.dtype
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        return _line(self.places[-1].end)


class Buckets:
    """The layout of some tensors, of which only names, shapes and dtypes are looked at; they may be meta ones.

    A tensor larger than `limit` bytes has a bucket of its own.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], limit: int = LIMIT) -> None:
        kinds: dict[torch.dtype, list[list[Place]]] = {}
        for name, tensor in tensors:
            rows = kinds.setdefault(tensor.dtype, [[]])
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            begin = _line(rows[-1][-1].end) if rows[-1] else 0
            if rows[-1] and begin + size > limit:
                rows.append([])
                begin = 0
            rows[-1].append(Place(name, tuple(tensor.shape), begin, begin + size))
        self.list = tuple(Bucket(dtype, tuple(places)) for dtype, rows in kinds.items() for places in rows)
        self.dtypes = len(kinds)
        self._bucket_of = {place.name: n for n, bucket in enumerate(self.list) for place in bucket.places}

    def __len__(self) -> int:
        return len(self.list)

    @property
    def largest(self) -> int:
        """Bytes of the largest bucket."""
        return max(bucket.nbytes for bucket in self.list)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(bucket.nbytes for bucket in self.list)

    @property
    def fingerprint(self) -> str:
        """Equal where the layouts are."""
        told = [[NAMES[b.dtype], [[p.name, p.shape, p.begin] for p in b.places]] for b in self.list]
        return blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def pack(
        self, tensors: Iterable[tuple[str, Tensor]], room: Callable[[int, int], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Each bucket's number and bytes, as soon as the last of its tensors was copied (and converted) into them.

        `room(number, nbytes)` gives the memory, uint8, when a bucket's first tensor comes. Tensors of one dtype come in
        the layout's order, so that no more buckets are open than there are dtypes.

        Raises:
            CheckpointError: a tensor that is unknown, misshapen, repeated, out of order or missing, named.
        """
        expected = {n: iter(bucket.places) for n, bucket in enumerate(self.list)}
        open_now: dict[int, Tensor] = {}
        done: set[int] = set()
        for name, tensor in tensors:
            number = self._bucket_of.get(name)
            if number is None:
                raise CheckpointError(f"'{name}' is no weight of this model: give the tensors of `decoder_tensors`")
            place = next(expected[number], None)
            if place is None or place.name != name:
                due = f"'{place.name}' is due" if place else "all of its bucket are there"
                raise CheckpointError(f"'{name}' came out of order or twice: {due}; keep the decoder's order")
            if place.shape != tuple(tensor.shape):
                raise CheckpointError(f"'{name}' has shape {list(tensor.shape)}, this model's has {list(place.shape)}")
            bucket = self.list[number]
            if number not in open_now:
                open_now[number] = room(number, bucket.nbytes)
            _view(open_now[number], bucket, place).copy_(tensor.detach())
            if place is bucket.places[-1]:
                done.add(number)
                yield number, open_now.pop(number)
        missing = [p.name for n, b in enumerate(self.list) if n not in done for p in expected[n]]
        if missing:
            raise CheckpointError(f"{len(missing)} weights did not come, the first is '{missing[0]}': give all of them")

    def unpack(self, number: int, data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a bucket as views of its bytes."""
        bucket = self.list[number]
        for place in bucket.places:
            yield place.name, _view(data, bucket, place)


def checksum(data: Tensor) -> int:
    """A sum of bytes (a multiple of 8 of them, on the CPU) that one stale, torn or moved piece changes.

    The words are added up by row and by column of a table, and the sums by crc32: three times as fast as a crc32 of
    everything, about what it takes to read the memory once.
    """
    words = data.view(torch.int64).numpy()
    whole = len(words) // LANES
    table = words[: whole * LANES].reshape(whole, LANES)
    across, down = np.zeros(whole, np.int64), np.zeros(LANES, np.int64)
    step = 16  # rows that stay in the cache for the second sum
    for first in range(0, whole, step):
        rows = table[first : first + step]
        rows.sum(1, out=across[first : first + step])
        down += rows.sum(0)
    told = zlib.crc32(down.data, zlib.crc32(across.data))
    return zlib.crc32(words[whole * LANES :].tobytes(), told)


def _view(data: Tensor, bucket: Bucket, place: Place) -> Tensor:
    return data[place.begin : place.end].view(bucket.dtype).view(place.shape)


def _line(end: int) -> int:
    return -(-end // LINE) * LINE
