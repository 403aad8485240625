"""Weights that ranks hold between them come out whole and in order, one at a time, on the ranks that want them."""

from __future__ import annotations

import gc
from contextlib import closing

import pytest
import torch
from torch import Tensor
from world import run_ranks

from twofold.align.buckets import Buckets
from twofold.align.gather import gathered
from twofold.models.decoder import Decoder
from twofold.models.weights import decoder_tensors, spec_from
from twofold.parallel import Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train.axes import Axes
from twofold.train.init import init_weights
from twofold.train.places import Places
from twofold.train.state import weight_pieces
from twofold.train.zero import Zero

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def whole() -> Decoder:
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 5)
    return decoder


def held_beside(before: int) -> int:
    """Bytes of tensors that live now and did not before."""
    gc.collect()
    return _alive() - before


def _alive() -> int:
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor}
    return sum(seen.values())


def ask(rank: int, stage: int, to: tuple[int, ...], stop: int | None) -> tuple[dict[str, Tensor], int]:
    mesh = Mesh(lay_out(ParallelConfig(zero=stage), 2), rank)
    decoder = whole()
    Zero(decoder, mesh)
    pieces = weight_pieces(decoder, Places(decoder, Axes(mesh)), torch.float32)
    gc.collect()
    before, most, found = _alive(), 0, {}
    stream = gathered(pieces, decoder.spec, torch.float32, mesh, to)
    with closing(stream):
        for number, (name, tensor) in enumerate(stream):
            most = max(most, held_beside(before))
            found[name] = tensor.numpy().copy()
            if number == stop:
                break
    return {name: torch.from_numpy(array) for name, array in found.items()}, most


@pytest.mark.parametrize(("stage", "to"), [(3, (0,)), (3, (0, 1)), (1, (1,))])
def test_whole_tensors_in_the_decoders_order(stage: int, to: tuple[int, ...]) -> None:
    expected = dict(decoder_tensors(whole()))
    answers = run_ranks(2, ask, stage, to, None)
    for rank, (found, most) in enumerate(answers):
        if rank not in to:
            assert not found
            continue
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        largest = max(p.nbytes for p in whole().parameters())
        assert stage < 3 or most <= 2 * largest < Buckets(expected.items()).nbytes / 2


def test_one_that_stops_early_leaves_nobody_waiting() -> None:
    found, _ = run_ranks(2, ask, 3, (0,), 2)[0]
    assert len(found) == 3
