"""Pieces: what a rank holds of a tensor, as boxes of the whole, so that any layout reads what any other wrote.

    exp_avg.layers.0.qkv.weight [8, 4]         written by 4 ranks        read by 3
                                               0  rows 0:2               0  rows 0:3   0's, and half of 1's
                                               1  rows 2:4               1  rows 3:6   half of 1's, and 2's
                                               2  rows 4:6               2  rows 6:8   3's
                                               3  rows 6:8

The whole is the tensor of one process, fused rows in their order there (q, k, v; gate, up). A divided parameter is one
box of it, a part of a fused matrix is several, a copy is the same box on many ranks and is written by one of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError
from ..models.shards import DTYPES, NAMES, Pending, Shard

INDEX = "state.index.json"
FORMAT = 1
OLD = "optimizer.safetensors"
"""What a checkpoint had instead before ranks wrote it: all of it in one file."""

Box = tuple[tuple[int, int], ...]
"""A half-open range for each dimension."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One box of what is `local`, and where it lies in the `whole`."""

    whole: Box
    local: Box


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank has of a tensor of `shape`: a tensor of shape `local`, and where its parts belong."""

    shape: tuple[int, ...]
    local: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @classmethod
    def all(cls, shape: Sequence[int]) -> Held:
        """The whole tensor."""
        box = full(shape)
        return cls(tuple(shape), tuple(shape), (Cut(box, box),) if volume(box) else ())

    @classmethod
    def box(cls, shape: Sequence[int], box: Box) -> Held:
        """One box of the whole, such as the rows that ZeRO gives a rank."""
        local = tuple(last - first for first, last in box)
        return cls(tuple(shape), local, (Cut(box, full(local)),) if volume(box) else ())

    def of(self, inner: Held) -> Held:
        """What `inner` holds of this rank's local tensor, as held of the whole: ZeRO's rows of tensor parallel ones."""
        cuts = []
        for mine in self.cuts:
            for part in inner.cuts:
                common = overlap(mine.local, part.whole)
                if common is not None:
                    cuts.append(Cut(moved(common, mine.local, mine.whole), moved(common, part.whole, part.local)))
        return Held(self.shape, inner.local, tuple(cuts))

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        if len(self.cuts) == 1 and self.cuts[0].local == full(self.local):
            return view(whole, self.cuts[0].whole)
        out = whole.new_zeros(self.local)
        for cut in self.cuts:
            view(out, cut.local).copy_(view(whole, cut.whole))
        return out


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's `tensor`, what of the whole it is, and the dtype that it is written in."""

    held: Held
    tensor: Tensor
    dtype: torch.dtype

    def copied(self) -> Piece:
        """The same in memory of its own, in the dtype to write."""
        return Piece(self.held, self.tensor.detach().to("cpu", self.dtype, copy=True), self.dtype)

    def at(self, box: Box) -> Tensor:
        """The part that is this box of the whole."""
        cut = next(cut for cut in self.held.cuts if cut.whole == box)
        return view(self.tensor.detach(), cut.local).to("cpu", self.dtype)


Pieces = Mapping[str, Piece]


def full(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    """Numbers in a box."""
    return math.prod(last - first for first, last in box)


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common, if anything."""
    common = tuple((max(i, k), min(j, m)) for (i, j), (k, m) in zip(a, b, strict=True))
    return common if all(first < last for first, last in common) else None


def moved(box: Box, start: Box, end: Box) -> Box:
    """A box inside `start`, where it lies when `start` is put at `end`."""
    return tuple((i - a + b, j - a + b) for (i, j), (a, _), (b, _) in zip(box, start, end, strict=True))


def view(tensor: Tensor, box: Box) -> Tensor:
    """A box of a tensor, without a copy."""
    return tensor[tuple(slice(first, last) for first, last in box)]


# --------------------------------------------------------------------------------------------- who writes what
@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that ranks hold between them, and who gives which box of it."""

    shape: tuple[int, ...]
    dtype: str
    givers: tuple[tuple[Box, int], ...]


def table(pieces: Pieces) -> dict[str, Any]:
    """What this rank holds, as JSON."""
    return {
        name: [NAMES[piece.dtype], piece.held.shape, [cut.whole for cut in piece.held.cuts]]
        for name, piece in pieces.items()
    }


def divide(tables: Iterable[Mapping[str, Any]]) -> dict[str, Whole]:
    """One giver for each box, from all ranks' tables: of those that have it, the one that gives least so far.

    Every rank that is given the same tables divides alike.

    Raises:
        CheckpointError: ranks differ about a tensor, or have not all of it between them.
    """
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    holders: dict[str, dict[Box, list[int]]] = {}
    load: dict[int, int] = {}
    for rank, told in enumerate(tables):
        for name, (dtype, shape, boxes) in told.items():
            kind = (dtype, tuple(shape))
            if kinds.setdefault(name, kind) != kind:
                raise CheckpointError(f"'{name}' is {kind} on rank {rank} and {kinds[name]} on another")
            for box in boxes:
                holders.setdefault(name, {}).setdefault(_box(box), []).append(rank)
    wholes = {}
    for name, (dtype, shape) in kinds.items():
        givers = []
        for box, ranks in holders.get(name, {}).items():
            giver = min(ranks, key=lambda rank: (load.get(rank, 0), rank))
            load[giver] = load.get(giver, 0) + volume(box) * DTYPES[dtype].itemsize
            givers.append((box, giver))
        if sum(volume(box) for box, _ in givers) < math.prod(shape):
            raise CheckpointError(f"the ranks have not all of '{name}' {list(shape)} between them")
        wholes[name] = Whole(shape, dtype, tuple(givers))
    return wholes


def file_of(rank: int, world: int) -> str:
    """The file that a rank writes."""
    return f"state-{rank + 1:05}-of-{world:05}.safetensors"


def pending(pieces: Pieces, wholes: Mapping[str, Whole], rank: int) -> list[Pending]:
    """The tensors of this rank's file."""
    return [
        Pending(
            name=key,
            dtype=pieces[name].dtype,
            shape=tuple(last - first for first, last in box),
            values=lambda name=name, box=box: pieces[name].at(box),  # type: ignore[misc]
        )
        for name, key, box, giver in _keys(wholes)
        if giver == rank
    ]


def index(wholes: Mapping[str, Whole], world: int) -> dict[str, Any]:
    """What is where, as JSON."""
    tensors: dict[str, Any] = {n: {"dtype": w.dtype, "shape": w.shape, "pieces": []} for n, w in wholes.items()}
    for name, key, box, giver in _keys(wholes):
        tensors[name]["pieces"].append({"file": file_of(giver, world), "key": key, "box": box})
    return {"format": FORMAT, "world": world, "tensors": tensors}


def _keys(wholes: Mapping[str, Whole]) -> Iterable[tuple[str, str, Box, int]]:
    for name, whole in wholes.items():
        count: dict[int, int] = {}
        for box, giver in whole.givers:
            count[giver] = count.get(giver, 0) + 1
            yield name, name if count[giver] == 1 else f"{name}#{count[giver]}", box, giver


def _box(ranges: Any) -> Box:
    return tuple((int(first), int(last)) for first, last in ranges)


# --------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor: each box of it in a file, under a key."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[tuple[str, str, Box], ...]


class Stored:
    """The pieces of a checkpoint's directory, of which any box can be read; files are opened when they are needed.

    Raises:
        CheckpointError: no index, or one that cannot be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Shard] = {}
        self.world = 1
        self.entries = self._old() if not (directory / INDEX).exists() else self._read()

    def _read(self) -> dict[str, Entry]:
        path = self.directory / INDEX
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
            self.world = int(data["world"])
            return {
                name: Entry(
                    DTYPES[item["dtype"]],
                    tuple(item["shape"]),
                    tuple((Path(p["file"]).name, p["key"], _box(p["box"])) for p in item["pieces"]),
                )
                for name, item in data["tensors"].items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not an index of this trainer: {error!r}") from None

    def _old(self) -> dict[str, Entry]:
        entries = self._file(OLD).entries
        return {name: Entry(e.dtype, e.shape, ((OLD, name, full(e.shape)),)) for name, e in entries.items()}

    def _file(self, name: str) -> Shard:
        if name not in self._files:
            self._files[name] = Shard(self.directory / name)
        return self._files[name]

    def read(self, name: str, held: Held | None = None) -> Tensor:
        """What `held` says of a tensor (all of it by default), wherever its parts lie; a view of a file that has it so.

        Raises:
            CheckpointError: there is no such tensor, it has another shape, or parts of it are nowhere.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory / INDEX} lacks '{name}'")
        held = held or Held.all(entry.shape)
        if entry.shape != held.shape:
            raise CheckpointError(
                f"{self.directory.name}: '{name}' is {list(entry.shape)}, this model's is {list(held.shape)}"
            )
        if len(entry.places) == 1 and held == Held.all(entry.shape):
            return self._tensor(*entry.places[0])
        out = torch.zeros(held.local, dtype=entry.dtype)
        missing = sum(volume(cut.whole) for cut in held.cuts)
        for file, key, box in entry.places:
            found = [(cut, common) for cut in held.cuts if (common := overlap(cut.whole, box)) is not None]
            for cut, common in found:
                source = self._tensor(file, key, box)
                view(out, moved(common, cut.whole, cut.local)).copy_(
                    view(source, moved(common, box, full(source.shape)))
                )
                missing -= volume(common)
            if found:
                self._file(file).release(key)
        if missing > 0:
            raise CheckpointError(f"{self.directory.name}: {missing} numbers of '{name}' are in no file")
        return out

    def _tensor(self, file: str, key: str, box: Box) -> Tensor:
        shard = self._file(file)
        if key not in shard.entries or shard.entries[key].shape != tuple(last - first for first, last in box):
            raise CheckpointError(f"{shard.path} has not the box of '{key}' that {INDEX} says it has")
        return shard.tensor(key)
