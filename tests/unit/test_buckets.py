"""Buckets: what goes in comes out, in few pieces, and what is wrong is named."""

from __future__ import annotations

import pytest
import torch

from twofold.align.buckets import LANES, Buckets, checksum
from twofold.core import CheckpointError


def tensors(scale=1.0):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (7, 5), "bias": (3,), "b": (40, 40), "c": (1,), "d": (9, 9)}
    for name, shape in shapes.items():
        made = torch.randn(shape, generator=generator) * scale
        yield name, made if name == "bias" else made.bfloat16()


def packed(buckets, source):
    return {n: data.clone() for n, data in buckets.pack(source, lambda n, size: torch.zeros(size, dtype=torch.uint8))}


@pytest.mark.parametrize(("limit", "count"), [(1 << 20, 2), (3500, 3), (1, 5)])
def test_what_goes_in_comes_out(limit, count):
    buckets = Buckets(tensors(), limit)
    assert len(buckets) == count
    found = dict(pair for n, data in packed(buckets, tensors()).items() for pair in buckets.unpack(n, data))
    assert found.keys() == dict(tensors()).keys()
    for name, tensor in tensors():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_unpacking_copies_nothing_and_tensors_begin_at_lines():
    buckets = Buckets(tensors())
    data = packed(buckets, tensors())[0]
    for _, view in buckets.unpack(0, data):
        assert view.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
        assert (view.data_ptr() - data.data_ptr()) % 64 == 0


def test_wide_sources_are_narrowed_on_the_way():
    buckets = Buckets(tensors())
    wide = ((name, tensor.float() + 2**-20) for name, tensor in tensors())
    found = dict(pair for n, data in packed(buckets, wide).items() for pair in buckets.unpack(n, data))
    assert found["a"].dtype == torch.bfloat16
    assert torch.equal(found["a"], (dict(tensors())["a"].float() + 2**-20).bfloat16())


def test_no_more_buckets_are_open_than_there_are_dtypes():
    buckets, held, most = Buckets(tensors(), 1), set(), 0

    def room(number, size):
        nonlocal most
        held.add(number)
        most = max(most, len(held))
        return torch.zeros(size, dtype=torch.uint8)

    for number, _ in buckets.pack(tensors(), room):
        held.remove(number)
    assert not held and 1 <= most <= buckets.dtypes


def change(pairs, what):
    pairs = list(pairs)
    match what:
        case "missing":
            return pairs[:-1]
        case "twice":
            return [pairs[0], *pairs]
        case "order":
            return [pairs[2], pairs[0], *pairs[3:]]
        case "unknown":
            return [("zz", torch.zeros(1)), *pairs]
        case "misshapen":
            return [("a", torch.zeros(5, 7)), *pairs[1:]]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "the first is 'd'"),
        ("twice", "'a' came out of order or twice"),
        ("order", "'b' came out of order"),
        ("unknown", "'zz' is no weight"),
        ("misshapen", r"'a' has shape \[5, 7\]"),
    ],
)
def test_what_is_wrong_is_named(what, said):
    with pytest.raises(CheckpointError, match=said):
        packed(Buckets(tensors()), change(tensors(), what))


def test_fingerprints_tell_layouts_apart():
    same = Buckets(tensors()).fingerprint
    assert same == Buckets(tensors(scale=3.0)).fingerprint
    assert same == Buckets((name, t.to("meta")) for name, t in tensors()).fingerprint
    wider = ((name, t.float()) for name, t in tensors())
    renamed = ((name + "x", t) for name, t in tensors())
    assert len({same, *(Buckets(kind).fingerprint for kind in (wider, renamed))}) == 3
    assert Buckets(tensors(), 3500).fingerprint != same


@pytest.mark.parametrize("words", [8, LANES, 3 * LANES + 5, 40 * LANES])
def test_the_checksum_sees_a_bit_a_stale_piece_and_a_move(words):
    data = torch.randint(0, 256, (8 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = checksum(data)
    assert whole == checksum(data.clone())
    flipped = data.clone()
    flipped[8 * words // 2] ^= 16
    stale = data.clone()
    stale[4 * words :] = 0
    moved = data.roll(8)
    assert len({whole, *map(checksum, (flipped, stale, moved))}) == 4
    if words >= 2 * LANES:
        rows = data.clone()
        rows[: 8 * LANES], rows[8 * LANES : 16 * LANES] = data[8 * LANES : 16 * LANES], data[: 8 * LANES]
        assert checksum(rows) != whole
