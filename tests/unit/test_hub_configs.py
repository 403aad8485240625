"""config.json as well-known checkpoints carry it, old spellings included: each reads without a word left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twofold.models import spec_from
from twofold.models.spec import (
    Alibi,
    Attention,
    DynamicNtk,
    Gated,
    Learned,
    Llama3Scaling,
    LongRope,
    Mixture,
    Parallel,
    PostResidual,
    Rope,
    Sandwich,
)

HUB: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("hub_configs.json").read_text(encoding="utf-8"))


def mixer_of(name: str, layer: int = 0) -> Attention:
    return spec_from(HUB[name]).layers[layer].mixer


@pytest.mark.parametrize("name", sorted(HUB))
def test_every_key_is_read(name: str) -> None:
    spec = spec_from(HUB[name])
    assert spec.architecture == HUB[name]["architectures"][0]
    assert spec.vocab == HUB[name]["vocab_size"]


def test_llama_rope() -> None:
    assert mixer_of("llama-2-7b").position == Rope(theta=10000.0, dim=128)
    assert mixer_of("llama-3.1-8b").position == Rope(
        theta=500000.0, dim=128, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=8192)
    )
    assert mixer_of("llama-dynamic-old-spelling").position == Rope(
        theta=10000.0, dim=128, scaling=DynamicNtk(factor=2.0, original=4096)
    )
    assert spec_from(HUB["llama-dynamic-old-spelling"]).max_len == 8192


def test_partial_rotary_in_three_spellings() -> None:
    assert mixer_of("phi-2").position == Rope(theta=10000.0, dim=32)
    assert mixer_of("pythia-70m").position == Rope(theta=10000.0, dim=16)
    assert mixer_of("gpt-j-6b").position == Rope(theta=10000.0, dim=64, interleaved=True)


def test_longrope_takes_its_length_from_beside_the_table() -> None:
    position = mixer_of("phi-4-mini").position
    assert isinstance(position, Rope) and isinstance(position.scaling, LongRope)
    assert (position.dim, position.scaling.original, position.scaling.factor) == (96, 4096, 32.0)


def test_windows() -> None:
    assert mixer_of("mistral-7b-v0.1").window == 4096
    assert mixer_of("qwen2.5-7b").window is None
    assert [mixer_of("gemma-2-2b", i).window for i in range(3)] == [4096, None, 4096]
    assert [mixer_of("gemma-3-1b", i).window for i in range(7)] == [512] * 5 + [None, 512]


def test_gemma3_scales_only_its_full_layers() -> None:
    local, full = mixer_of("gemma-3-1b", 0).position, mixer_of("gemma-3-1b", 5).position
    assert local == Rope(theta=10000.0, dim=256)
    assert isinstance(full, Rope) and full.theta == 1e6 and full.scaling is not None


def test_shapes_of_blocks() -> None:
    assert isinstance(spec_from(HUB["gemma-2-2b"]).layers[0].norms, Sandwich)
    assert isinstance(spec_from(HUB["opt-350m"]).layers[0].norms, PostResidual)
    assert spec_from(HUB["opt-350m"]).embedding.positions == Learned(size=2048, offset=2)
    assert spec_from(HUB["falcon-7b"]).layers[0].norms == Parallel(
        norm=spec_from(HUB["falcon-7b"]).layers[0].norms.norm, shared=True
    )
    assert mixer_of("falcon-7b").kv_heads == 1
    assert isinstance(mixer_of("bloom-560m").position, Alibi)
    gemma = spec_from(HUB["gemma-2b"]).layers[0].ffn
    assert isinstance(gemma, Gated) and gemma.act == "gelu_tanh"
    moe = spec_from(HUB["qwen1.5-moe"]).layers[0].ffn
    assert isinstance(moe, Mixture) and (moe.experts, moe.top_k, moe.shared_width) == (60, 4, 5632)
