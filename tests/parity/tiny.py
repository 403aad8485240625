"""Tiny random decoders of every kind of mixer and feed-forward, and one way to run requests on them."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from twofold.core import build
from twofold.core.sparse import BigBird, Fixed
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Output, Request, TokenOut
from twofold.engine.sampling import SamplingParams
from twofold.models.decoder import Decoder
from twofold.models.quantized import formats, sites, swap
from twofold.models.spec import (
    Alibi,
    Attention,
    Embedding,
    Gated,
    Head,
    LayerSpec,
    Mixture,
    ModelSpec,
    Names,
    Norm,
    Parallel,
    Plain,
    Pre,
    Rope,
    Sandwich,
)
from twofold.quant.linear import QuantLinear

VOCAB = 131
RMS = Norm(kind="rms", eps=1e-6)
LAYER = Norm(kind="layer", eps=1e-5, bias=True)
ROPE = Rope(theta=1e4, dim=12)


def _spec(*layers: LayerSpec, norm: Norm = RMS, tied: bool = True, scale: float = 1.0, cap: float | None = None):
    return ModelSpec(
        architecture="Tiny",
        hidden=44,
        vocab=VOCAB,
        layers=layers,
        norm=norm,
        head=Head(tied=tied, softcap=cap),
        names=Names(table={}),
        embedding=Embedding(scale=scale),
        max_len=512,
    )


def _attention(**changes) -> Attention:
    return Attention(**({"heads": 4, "kv_heads": 2, "head_dim": 12, "position": ROPE} | changes))


def _gemma(window: int | None) -> LayerSpec:
    mixer = _attention(window=window, softcap=20.0, scale=0.3)
    return LayerSpec(mixer=mixer, ffn=Gated(width=61, act="gelu_tanh"), norms=Sandwich(norm=RMS))


LLAMA = LayerSpec(mixer=_attention(), ffn=Gated(width=61, act="silu"), norms=Pre(norm=RMS))
ALIBI = LayerSpec(
    mixer=_attention(kv_heads=4, position=Alibi(), qkv_bias=True, out_bias=True),
    ffn=Plain(width=83, act="gelu", bias=True),
    norms=Parallel(norm=LAYER, shared=False),
)
MOE = LayerSpec(
    mixer=_attention(kv_heads=1, qk_norm="head", qk_norm_kind=RMS),
    ffn=Mixture(experts=6, top_k=2, width=23, act="silu", shared_width=31),
    norms=Pre(norm=RMS),
)
FIXED = Fixed(num_local_blocks=3, num_different_global_patterns=2, different_layout_per_head=True)
BIRD = BigBird(block=32, num_sliding_window_blocks=1, different_layout_per_head=True)
SPECS = {
    "llama": _spec(LLAMA, LLAMA, tied=False),
    "gemma2": _spec(_gemma(29), _gemma(None), scale=6.6, cap=30.0),
    "alibi": _spec(ALIBI, ALIBI, norm=LAYER),
    "moe": _spec(MOE, LLAMA),
    "sparse": _spec(*(replace(LLAMA, mixer=_attention(sparse=layout)) for layout in (FIXED, None, BIRD))),
}


def decoder(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    made = Decoder(spec, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return made


def rounded(decoder: Decoder, name: str) -> Decoder:
    """The decoder with its weights in a number format."""
    places = sites(decoder)
    for place, format in formats(decoder, name).items():
        module = places[place]
        assert not isinstance(module, QuantLinear)
        swap(decoder, place, QuantLinear.of(format.quantize(module.weight.detach()), module.bias))
    return decoder


def engine(model: Decoder, **settings) -> Engine:
    plain = {"num_blocks": 400, "max_num_seqs": 32, "max_num_batched_tokens": 2048}
    return Engine(model, build(EngineConfig, plain | settings), eos_ids=(7,))


def request(number: int, *, length: int | None = None, **params) -> Request:
    """Request `number` of a fixed family: its own prompt, its own sampling, its own seed."""
    rng = random.Random(number)
    kind = [
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.2},
        {"temperature": 0.7, "top_k": 9, "frequency_penalty": 0.5, "logprobs_mode": "processed"},
    ][number % 4]
    usual = {"max_tokens": 12, "seed": 1000 + number, "logprobs": 3, "ignore_eos": True}
    prompt = tuple(rng.randrange(VOCAB) for _ in range(length or rng.choice([3, 20, 33, 70, 150])))
    return Request(id=f"r{number}", prompt_ids=prompt, params=SamplingParams(**(usual | kind | params)))


class Said(dict):
    """Everything that came out: request id to its tokens with their exact log-probabilities; `prompts` likewise."""

    def __init__(self) -> None:
        self.prompts: dict[str, tuple[TokenOut, ...]] = {}
        self.ends: dict[str, Output] = {}

    def hear(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.setdefault(output.request_id, []).extend(output.tokens)
            if output.prompt is not None:
                self.prompts[output.request_id] = output.prompt
            if output.finish is not None:
                assert output.request_id not in self.ends
                self.ends[output.request_id] = output


def run(on: Engine, *requests: Request) -> Said:
    """Submit all, step until all have ended, and check that no block is left in use."""
    said = Said()
    for each in requests:
        on.submit(each)
    while on.has_work:
        said.hear(on.step())
    assert on.pool.used == 0
    return said
