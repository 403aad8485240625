"""A compiled decoder has the bits of its layers run one kernel at a time, for every format of weights and of cache."""

from __future__ import annotations

import pytest
import torch

from tests.parity import tiny
from twofold.engine.paged import KVCache, PagedContext, Span
from twofold.kernels import native
from twofold.models.compile import Program, Spans, why_not

FORMATS = (None, "int8", "int4", "int8-g32", "int4-asym", "int4-weight-only", "fp8")
pytestmark = pytest.mark.skipif(bool(native.missing()), reason="no CPU kernels: nothing is compiled")


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", tiny.SPECS)
def test_a_program_has_the_bits_of_the_layers_one_by_one(name: str, format: str | None, kv_dtype: torch.dtype) -> None:
    spec = tiny.SPECS[name]
    for dtype in (torch.float32,) if format else (torch.float32, torch.bfloat16):
        decoder = tiny.decoder(spec, dtype)
        if format:
            tiny.rounded(decoder, format)
        assert not why_not(decoder)
        plain, compiled = KVCache(spec, 40, 16, kv_dtype), KVCache(spec, 40, 16, kv_dtype)
        caches = [compiled.panels_of(i).struct() for i in range(len(compiled.layers))]
        program = Program(decoder, caches, tokens=300, rows=64)
        spans = [Span(0, 150, tuple(range(10))), Span(0, 7, (12,)), Span(0, 33, (15, 16, 17))]
        for step in range(3):
            ids = torch.randint(0, tiny.VOCAB, (sum(span.count for span in spans),))
            with torch.inference_mode():
                hidden_TD = decoder(ids, PagedContext(plain, spans))
                logits_RV = decoder.logits(hidden_TD[-3:])
            got_TD = program.run(
                Spans(
                    ids=ids.tolist(),
                    starts=[span.start for span in spans],
                    counts=[span.count for span in spans],
                    blocks=[span.blocks for span in spans],
                )
            )
            assert torch.equal(got_TD, hidden_TD), (dtype, step)
            assert torch.equal(program.logits(range(len(ids) - 3, len(ids))), logits_RV), (dtype, step)
            spans = [Span(span.start + span.count, 1, span.blocks) for span in spans]


def test_a_program_reads_weights_where_they_are() -> None:
    """A trainer that changes the weights in place is seen at the next step."""
    spec = tiny.SPECS["llama"]
    decoder = tiny.decoder(spec)
    cache = KVCache(spec, 4)
    caches = [cache.panels_of(i).struct() for i in range(len(cache.layers))]
    program = Program(decoder, caches, tokens=8, rows=8)
    spans = Spans(ids=[1, 2, 3], starts=[0], counts=[3], blocks=[(0,)])
    before = program.run(spans).clone()
    with torch.no_grad():
        decoder.layers[0].down.weight.mul_(2.0)
        after = decoder(torch.tensor([1, 2, 3]), PagedContext(KVCache(spec, 4), [Span(0, 3, (0,))]))
    assert torch.equal(program.run(spans), after) and not torch.equal(before, after)


def test_an_op_that_is_to_be_served_otherwise_is_not_compiled_past(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder(tiny.SPECS["llama"])
    monkeypatch.setenv("TWOFOLD_KERNELS", "linear=native,rms_norm=reference")
    assert why_not(decoder) == "rms_norm is to be served by reference"
    monkeypatch.setenv("TWOFOLD_KERNELS", "linear=native")
    assert not why_not(decoder)
