"""The engine's path on CUDA, all of it by Triton's interpreter: a token's hidden state has one bit pattern, whether its
sequence is whole as in training, in chunks over the cache, decoded one by one, or replayed in a batch rounded up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity import (
    interpreter,  # noqa: F401  (before any kernel)
    tiny,
)
from twofold.engine.cuda import CudaCache, CudaContext
from twofold.engine.graphs import DecodeGraphs
from twofold.engine.paged import Span
from twofold.engine.plan import Chunk
from twofold.kernels.op import Needs, all_ops
from twofold.models.fused import forward
from twofold.models.packed import PackedContext

CPU = torch.device("cpu")
LENGTHS = (41, 7)


@pytest.fixture
def on_triton():
    """Every op that Triton serves, served by it for the CPU's tensors too."""
    ops = [op for op in all_ops() if "triton" in op.implementations]
    before = [op.implementations["triton"] for op in ops]
    for op, item in zip(ops, before, strict=True):
        op.implementations["triton"] = replace(item, needs=Needs(), missing=lambda: "")
        op.use("triton")
    yield
    for op, item in zip(ops, before, strict=True):
        op.implementations["triton"] = item
        op.use(None)


def blocks(number: int) -> tuple[int, ...]:
    return tuple(range(number * 4 + 3, number * 4, -1))


def recorder(run):
    out = run()
    return lambda: out.copy_(run()), out


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gemma2", "alibi", "moe", "sparse"])
def test_the_engines_bits_are_the_trainers(on_triton, name):
    decoder = tiny.decoder(tiny.SPECS[name])
    ids = torch.randint(0, tiny.VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    texts = ids.split(LENGTHS)
    truth = decoder(ids, PackedContext(LENGTHS)).split(LENGTHS)
    cache = CudaCache(decoder.spec, 16, 16, torch.float32, CPU)

    def step(*spans: tuple[int, int, int]) -> None:
        """Spans of (sequence, start, count) together in one step."""
        given = torch.cat([texts[n][start : start + count] for n, start, count in spans])
        ctx = CudaContext(cache, [Span(start, count, blocks(n)) for n, start, count in spans], CPU)
        for (n, start, count), got in zip(spans, forward(decoder, given, ctx).split([s[2] for s in spans])):
            assert torch.equal(got, truth[n][start : start + count]), (n, start)

    step((0, 0, 25))
    step((1, 0, 1), (0, 25, 14))
    step((1, 1, 4), (0, 39, 1))
    graphs = DecodeGraphs(decoder, cache, rows=4, max_len=64, capture=recorder)
    for at in (0, 1):
        chunks = [
            Chunk(serial=n, start=start + at, ids=(int(texts[n][start + at]),), blocks=blocks(n))
            for n, start in ((0, 39), (1, 5))
        ]
        got = graphs.run(chunks)
        assert torch.equal(got, torch.stack([truth[n][start + at] for n, start in ((0, 39), (1, 5))]))
    assert len(graphs._graphs) == 1


def test_training_by_the_kernels_has_the_references_gradients(on_triton):
    decoder = tiny.decoder(tiny.SPECS["moe"])
    ids = torch.randint(0, tiny.VOCAB, (9,), generator=torch.Generator().manual_seed(2))
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    ours = torch.autograd.grad(decoder(ids, PackedContext((5, 4))).square().sum(), parameters)
    for op in all_ops():
        op.use("together" if op.name == "packed_attention" else "reference")
    theirs = torch.autograd.grad(decoder(ids, PackedContext((5, 4))).square().sum(), parameters)
    for op in all_ops():
        op.use(None)
    for mine, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, truth, atol=2e-3, rtol=2e-3)
