"""Pieces: what any ranks wrote is read by any others, number for number."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofold.core import CheckpointError
from twofold.models.shards import write_shard
from twofold.train.pieces import (
    INDEX,
    Box,
    Cut,
    Held,
    Piece,
    Stored,
    divide,
    file_of,
    full,
    index,
    pending,
    table,
    view,
    volume,
)

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def boxes(shape: tuple[int, ...], edges: list[list[int]]) -> list[Box]:
    """The grid that cuts each dimension at its `edges`."""
    found: list[Box] = [()]
    for size, at in zip(shape, edges):
        ends = sorted({0, size, *(min(e, size) for e in at)})
        found = [(*box, (a, b)) for box in found for a, b in pairwise(ends)]
    return found


@st.composite
def divided(draw, shape: tuple[int, ...]) -> list[Held]:
    """What each of some ranks holds: a grid of boxes dealt out, some of them twice, each rank's laid in a row."""
    ranks = draw(st.integers(1, 4))
    edges = [draw(st.lists(st.integers(0, size), max_size=3)) for size in shape]
    mine: list[list[Box]] = [[] for _ in range(ranks)]
    for box in boxes(shape, edges):
        for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=2)):
            mine[rank].append(box)
    return [laid(shape, cuts) for cuts in mine]


def laid(shape: tuple[int, ...], cuts: list[Box]) -> Held:
    if not shape:
        return Held.all(shape) if cuts else Held((), (0,), ())
    rows, placed = 0, []
    for box in cuts:
        sizes = [last - first for first, last in box]
        placed.append(Cut(box, ((rows, rows + sizes[0]), *((0, size) for size in sizes[1:]))))
        rows += sizes[0]
    return Held(shape, (rows, *shape[1:]), tuple(placed))


@st.composite
def journeys(draw) -> list[tuple[tuple[int, ...], list[Held], list[Held]]]:
    """Some tensors: the shape of each, who writes it and who reads it."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    return [(shape, draw(divided(shape)), draw(divided(shape))) for shape in shapes]


@settings(max_examples=60)
@given(journeys())
def test_any_cut_to_any_cut(tmp_path_factory, journey) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    wholes = {f"t{n}": torch.randn(shape) for n, (shape, _, _) in enumerate(journey)}
    world = max(len(writers) for _, writers, _ in journey)
    write(folder, wholes, {f"t{n}": writers for n, (_, writers, _) in enumerate(journey)}, world)
    stored = Stored(folder)
    assert stored.world == world
    numbers = sum(volume(full(e.shape)) for shard in map(stored._file, files(folder)) for e in shard.entries.values())
    assert numbers == sum(t.numel() for t in wholes.values()), "a copy is written once"
    for n, (_, _, readers) in enumerate(journey):
        for held in readers:
            found = stored.read(f"t{n}", held)
            assert found.shape == held.local
            for cut in held.cuts:
                assert torch.equal(view(found, cut.local), view(wholes[f"t{n}"], cut.whole))
        assert torch.equal(stored.read(f"t{n}"), wholes[f"t{n}"])


def write(folder: Path, wholes: dict[str, Tensor], held: dict[str, list[Held]], world: int) -> None:
    ranks = []
    for rank in range(world):
        mine = {name: places[rank] for name, places in held.items() if rank < len(places)}
        ranks.append({name: Piece(h, h.take(wholes[name]), torch.float32) for name, h in mine.items()})
    found = divide([json.loads(json.dumps(table(pieces))) for pieces in ranks])
    for rank, pieces in enumerate(ranks):
        write_shard(folder / file_of(rank, world), pending(pieces, found, rank))
    (folder / INDEX).write_text(json.dumps(index(found, world)))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_part_of_a_part_is_a_part_of_the_whole() -> None:
    """Queries, keys and values of one tensor parallel rank of two, of which ZeRO gives a rank its rows."""
    whole = torch.arange(24.0).view(12, 2)
    rows = ((4, 8), (9, 10), (11, 12))  # of q, k and v
    local, cuts = 0, []
    for first, last in rows:
        cuts.append(Cut(((first, last), (0, 2)), ((local, local + last - first), (0, 2))))
        local += last - first
    tensor_parallel = Held((12, 2), (6, 2), tuple(cuts))
    part = tensor_parallel.take(whole)
    assert torch.equal(part, whole[[4, 5, 6, 7, 9, 11]])
    joined = []
    for rank in range(2):
        zero = Held.box((6, 2), ((3 * rank, 3 * rank + 3), (0, 2)))
        both = tensor_parallel.of(zero)
        assert both.shape == (12, 2) and both.local == (3, 2)
        joined.append(both.take(whole))
        assert torch.equal(joined[-1], zero.take(part))
    assert torch.equal(torch.cat(joined), part)


def test_an_empty_shard_is_read_as_one(tmp_path: Path) -> None:
    nothing = Held.box((2, 3), ((2, 2), (0, 3)))
    write(tmp_path, {"w": torch.ones(2, 3)}, {"w": [Held.all((2, 3)), nothing]}, 2)
    assert Stored(tmp_path).read("w", nothing).shape == (0, 3)


def test_copies_are_shared_out_by_bytes() -> None:
    tensors = {f"t{n}": Piece(Held.all((10,)), torch.zeros(10), torch.float32) for n in range(8)}
    found = divide([table(tensors)] * 4)
    givers = [rank for whole in found.values() for _, rank in whole.givers]
    assert sorted(givers) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    half = Held.box((4,), ((0, 2),))
    with pytest.raises(CheckpointError, match=r"not all of 'w' \[4\]"):
        divide([table({"w": Piece(half, torch.zeros(2), torch.float32)})])
    with pytest.raises(CheckpointError, match=r"'w' is .* on rank 1"):
        divide([table({"w": Piece(Held.all((n,)), torch.zeros(n), torch.float32)}) for n in (2, 3)])
    write(tmp_path, {"w": torch.ones(4)}, {"w": [Held.all((4,))]}, 1)
    with pytest.raises(CheckpointError, match="lacks 'v'"):
        Stored(tmp_path).read("v")
    with pytest.raises(CheckpointError, match=r"'w' is \[4\], this model's is \[5\]"):
        Stored(tmp_path).read("w", Held.all((5,)))
    told = json.loads((tmp_path / INDEX).read_text())
    told["tensors"]["w"]["pieces"][0]["box"] = [[0, 3]]
    (tmp_path / INDEX).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="has not the box of 'w'"):
        Stored(tmp_path).read("w")
    told["tensors"]["w"]["pieces"] = []
    (tmp_path / INDEX).write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="4 numbers of 'w' are in no file"):
        Stored(tmp_path).read("w")
    (tmp_path / INDEX).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="is not an index"):
        Stored(tmp_path)
