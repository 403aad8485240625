"""Which tile a product runs in: a narrower one only where it was seen to give the definition's bits."""

from __future__ import annotations

import pytest
import torch

from twofold.kernels.triton import tiles
from twofold.kernels.triton.tiles import Kind, Tile, choose, definition, narrow

PLAIN = Kind(4096, 11_008, 0, 0, False, torch.bfloat16, "cpu")
KINDS = [
    PLAIN,
    PLAIN._replace(columns=151_936),
    PLAIN._replace(dtype=torch.float32),
    PLAIN._replace(bits=4, group=32),
    PLAIN._replace(bits=8, dynamic=True),
    PLAIN._replace(bits=8, group=128, dtype=torch.float32),
]


@pytest.fixture(autouse=True)
def unseen(monkeypatch):
    monkeypatch.setattr(tiles, "_seen", {})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_tile_of_a_kind_takes_the_inputs_in_the_same_steps(kind):
    assert {tile.inner for tile in narrow(kind)} == {definition(kind).inner}
    assert not kind.group or kind.group % definition(kind).inner == 0


def test_few_rows_run_in_the_narrowest_tile_that_is_alike():
    asked: list[tuple[int, int]] = []

    def run(x_MK, kind, tile):
        asked.append((tile.rows, len(x_MK)))
        return x_MK.sum(-1)

    assert [choose(PLAIN, rows, run).rows for rows in (1, 16, 17, 64, 65, 5000)] == [16, 16, 64, 64, 128, 128]
    assert asked == [(128, 128)] + [(16, 16)] * 8 + [(128, 128)] + [(64, 64)] * 2, "each tile is compared once"


def test_a_tile_with_other_bits_never_runs():
    def run(x_MK, kind, tile):
        return x_MK.sum(-1) + (2.0**-20 if tile.rows == 16 else 0.0)

    x32 = PLAIN._replace(dtype=torch.float32)
    assert choose(x32, 1, run) == definition(x32)

    def run_wide(x_MK, kind, tile):
        return x_MK.float().sum(-1) * (1.0 if tile.rows > 16 else 1.5)

    assert choose(PLAIN, 1, run_wide).rows == 64


def test_a_small_chip_has_fewer_stages_then_columns(monkeypatch):
    monkeypatch.setattr(tiles, "_shared_memory", lambda device: 99 * 1024)
    whole = Tile(128, 256, 64, 8, 3)
    fitting = tiles._fitting(whole, PLAIN)
    assert fitting.shared(2) <= 99 * 1024 and (fitting.rows, fitting.inner) == (128, 64)
    assert fitting == Tile(128, 256, 64, 8, 2)
    assert tiles._fitting(Tile(128, 256, 128, 8, 3), PLAIN).columns == 64
