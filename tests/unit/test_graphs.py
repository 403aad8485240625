"""Captured decode without a device: which steps are replayed, at which size, from which buffers."""

from __future__ import annotations

import pytest
import torch

from twofold.engine import graphs
from twofold.engine.cuda import CudaCache, split_reach
from twofold.engine.graphs import Buffers, DecodeGraphs, sizes
from twofold.engine.plan import Chunk
from twofold.models.spec import Attention, Gated, Head, LayerSpec, ModelSpec, Names, Norm, Pre, Rope

NORM = Norm(kind="rms", eps=1e-6)
LAYER = LayerSpec(
    mixer=Attention(heads=2, kv_heads=1, head_dim=4, position=Rope(theta=1e4, dim=4)),
    ffn=Gated(width=8, act="silu"),
    norms=Pre(norm=NORM),
)
SPEC = ModelSpec(
    architecture="Test", hidden=8, vocab=11, layers=(LAYER,), norm=NORM, head=Head(tied=True), names=Names(table={})
)


def decode(serial: int, start: int, *blocks: int) -> Chunk:
    return Chunk(serial=serial, start=start, ids=(serial + 5,), blocks=blocks)


def test_sizes_hold_every_batch_and_waste_little():
    for most in (1, 3, 8, 100, 256, 600):
        found = sizes(most)
        assert found == sorted(set(found)) and found[0] == 1 and found[-1] == most
        for rows in range(1, most + 1):
            size = next(size for size in found if size >= rows)
            assert size - rows <= max(1, 7, rows // 4)


def test_reaches_are_few_and_hold_every_length():
    reaches = {split_reach(length) for length in range(1, 40_000)}
    assert reaches == {0, 2048, 8192, 32768, 131072}
    assert all(split_reach(length) >= length for length in (513, 2048, 2049, 8193))


def test_buffers_hold_the_step_and_rows_that_stand_nowhere():
    buffers = Buffers(4, 3, 16, torch.device("cpu"))
    buffers.fill([decode(0, 0, 9), decode(1, 33, 7, 3, 5), decode(2, 15, 2)], 4)
    assert buffers.ids_R.tolist() == [5, 6, 7, 0]
    assert buffers.positions_R.tolist() == [0, 33, 15, 0]
    assert buffers.slots_R.tolist() == [9 * 16, 5 * 16 + 1, 2 * 16 + 15, -1]
    assert buffers.sequences_R3.tolist() == [[0, 0, 1], [1, 33, 1], [2, 15, 1], [0, 0, 0]]
    assert buffers.table_RP.tolist()[:3] == [[9, 0, 0], [7, 3, 5], [2, 0, 0]]
    places = [buffer.data_ptr() for buffer in (buffers.ids_R, buffers.table_RP, buffers.sequences_R3)]
    buffers.fill([decode(1, 34, 7, 3, 5)], 1)
    assert buffers.table_RP[0].tolist() == [7, 3, 5] and buffers.slots_R.tolist()[0] == 5 * 16 + 2
    assert buffers.sequences_R3[1].tolist() == [1, 33, 1], "rows beyond the batch are left as they are"
    assert [buffer.data_ptr() for buffer in (buffers.ids_R, buffers.table_RP, buffers.sequences_R3)] == places


class Fake:
    """A decoder whose hidden states are its ids, and a recorder that counts."""

    angles: dict = {}  # noqa: RUF012
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captured: list[tuple[int, int]] = []
        self.replayed = 0

    def capture(self, run):
        out = run()

        def replay():
            self.replayed += 1
            out.copy_(run())

        return replay, out


@pytest.fixture
def fake(monkeypatch):
    made = Fake()

    def forward(decoder, ids_T, ctx):
        made.captured.append((len(ids_T), ctx.crowds[0].reach))
        return ids_T[:, None].float()

    monkeypatch.setattr(graphs, "forward", forward)
    return made


def test_a_size_and_reach_is_captured_once_and_replayed(fake):
    cache = CudaCache(SPEC, 8, 16, torch.float32, "cpu")
    made = DecodeGraphs(fake, cache, rows=6, max_len=4096, capture=fake.capture)
    steps = [[decode(i, 3, 1) for i in range(count)] for count in (3, 4, 3, 6)] + [[decode(8, 700, *range(44))]]
    for chunks in steps:
        assert made.takes(chunks)
        assert made.run(chunks)[:, 0].tolist() == [chunk.ids[0] for chunk in chunks]
    assert set(made._graphs) == {(4, 0), (6, 0), (1, 2048)}
    assert fake.replayed == len(steps)


def test_steps_with_prompts_or_too_many_requests_are_not_replayed(fake):
    made = DecodeGraphs(fake, CudaCache(SPEC, 8, 16, torch.float32, "cpu"), rows=2, max_len=64, capture=fake.capture)
    prompt = Chunk(serial=1, start=0, ids=(1, 2), blocks=(0,))
    scored = Chunk(serial=1, start=0, ids=(1,), blocks=(0,), targets=(4,))
    assert not made.takes([decode(0, 3, 1), prompt])
    assert not made.takes([scored])
    assert not made.takes([decode(i, 3, 1) for i in range(3)])
    assert not made.takes([])


def test_a_cache_has_the_layout_of_the_kernels():
    cache = CudaCache(SPEC, 5, 16, torch.int8, "cpu")
    layer = cache.layers[0]
    assert layer["keys"].shape == (5, 1, 16, 4) and layer["key_scale"].shape == (5, 1, 16)
    assert cache.nbytes == 2 * 5 * 16 * (4 + 4)
    layer["values"].fill_(3)
    cache.clear([4])
    assert int(layer["values"].sum()) == 3 * 4 * 16 * 4
    assert not CudaCache.serves(torch.device("cpu"))
