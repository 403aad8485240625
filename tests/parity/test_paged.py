"""The paged cache against whole sequences: the same bits, whatever the chunks, the neighbours and the block size."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from twofold.engine.paged import KVCache, PagedContext, Span
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.spec import Alibi, Attention, Gated, Head, LayerSpec, ModelSpec, Names, Norm, Pre, Rope

LENGTHS = (300, 17, 1, 129, 128, 400)
NORM = Norm(kind="rms", eps=1e-6)
ROPE = Rope(theta=1e4, dim=20)
MIXERS = {
    "rope": Attention(heads=6, kv_heads=2, head_dim=20, position=ROPE),
    "window": Attention(heads=6, kv_heads=2, head_dim=20, position=ROPE, window=37),
    "softcap": Attention(heads=6, kv_heads=6, head_dim=20, position=ROPE, window=200, softcap=5.0),
    "alibi": Attention(heads=6, kv_heads=1, head_dim=20, position=Alibi()),
}


def decoder(mixer: Attention) -> Decoder:
    layer = LayerSpec(mixer=mixer, ffn=Gated(width=77, act="silu"), norms=Pre(norm=NORM))
    made = Decoder(
        ModelSpec(
            architecture="Test",
            hidden=60,
            vocab=101,
            layers=(layer, layer),
            norm=NORM,
            head=Head(tied=True),
            names=Names(table={}),
        )
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize(("chunk", "size"), [(1, 16), (7, 32), (64, 64), (1000, 16)])
def test_paged_logits_are_the_packed_ones_bit_for_bit(mixer: Attention, chunk: int, size: int) -> None:
    model = decoder(mixer)
    lengths = LENGTHS if chunk > 1 else (150, 17, 1)
    sequences = torch.randint(0, 101, (sum(lengths),), generator=torch.Generator().manual_seed(1)).split(lengths)
    block = count()
    tables = [tuple(next(block) for _ in range(-(-n // size))) for n in lengths]
    with torch.inference_mode():
        truth = model.logits(model(torch.cat(sequences), PackedContext(lengths))).split(lengths)
        cache = KVCache(model.spec, next(block), size)
        for step in range(0, max(lengths), chunk):
            live = [i for i, n in enumerate(lengths) if step < n]
            spans = [Span(step, min(chunk, lengths[i] - step), tables[i]) for i in live]
            ids = torch.cat([sequences[i][step : step + chunk] for i in live])
            logits = model.logits(model(ids, PagedContext(cache, spans)))
            for i, got in zip(live, logits.split([span.count for span in spans]), strict=True):
                assert torch.equal(got, truth[i][step : step + chunk]), (i, step)


def test_a_block_size_that_does_not_divide_the_walk_is_refused() -> None:
    with pytest.raises(ValueError, match="choose 16, 32, 64 or 128"):
        KVCache(decoder(MIXERS["rope"]).spec, 4, 12)


def test_clearing_blocks_removes_what_a_broken_request_left() -> None:
    cache = KVCache(decoder(MIXERS["rope"]).spec, 3, 16)
    cache.layers[0]["keys"][1] = torch.nan
    cache.clear([1])
    assert not any(part.isnan().any() for layer in cache.layers for part in layer.values())
