"""Qwen2, Qwen3 and their mixtures of experts: Llama with biases on q, k, v (2) or norms on each head's q and k (3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..reader import Reader
from ..spec import Attention, Ffn, Gated, LayerSpec, ModelSpec, Names, Pre
from .llama import LAYER, context_of, heads_of, layer_types, layers_of, model, names, rms
from .mixtral import mixture
from .registry import family
from .rope import rope_from

MLP = LAYER + "mlp."


def _moe_names() -> Names:
    base = names()
    experts = {
        "layers.{i}.router": MLP + "gate",
        "layers.{i}.experts.{e}.gate": MLP + "experts.{e}.gate_proj",
        "layers.{i}.experts.{e}.up": MLP + "experts.{e}.up_proj",
        "layers.{i}.experts.{e}.down": MLP + "experts.{e}.down_proj",
        "layers.{i}.shared.gate": MLP + "shared_expert.gate_proj",
        "layers.{i}.shared.up": MLP + "shared_expert.up_proj",
        "layers.{i}.shared.down": MLP + "shared_expert.down_proj",
        "layers.{i}.shared_gate": MLP + "shared_expert_gate",
    }
    also = {
        "layers.{i}.experts.gate_up.weight": MLP + "experts.gate_up_proj",
        "layers.{i}.experts.down.weight": MLP + "experts.down_proj",
    }
    return Names(table=base.table | experts, also=also, prefix=base.prefix, ignore=base.ignore)


def _window(hf: Reader) -> int | None:
    """The window's size when windows are in use at all; 0 and null are none."""
    size = hf.nullable(int, "sliding_window", default=4096)
    return (size or None) if hf.get(bool, "use_sliding_window", default=False) else None


def _dense(hf: Reader) -> Gated:
    return Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))


def _experts(hf: Reader, *, top_k: int, count: int, width: int, shared: int | None) -> Callable[[int], Ffn]:
    """The feed-forward of layer i: a mixture every `decoder_sparse_step` layers, the lists' exceptions apart."""
    experts = mixture(
        hf,
        experts=count,
        top_k=top_k,
        width=hf.size("moe_intermediate_size", default=width),
        renormalise=hf.get(bool, "norm_topk_prob", default=False),
        shared=shared,
    )
    step = hf.size("decoder_sparse_step", default=1)
    dense_layers = hf.get(list, "mlp_only_layers", default=[])
    dense = _dense(hf)
    return lambda i: dense if i in dense_layers or (i + 1) % step else experts


def _spec(
    hf: Reader,
    architecture: str,
    mixer: Attention,
    ffn: Callable[[int], Ffn],
    slides: Callable[[int], bool],
    names: Names,
) -> ModelSpec:
    window = _window(hf)
    sliding = layer_types(hf, lambda i: window is not None and slides(i))

    def layer(i: int) -> LayerSpec:
        return LayerSpec(
            mixer=replace(mixer, window=window if sliding[i] else None), ffn=ffn(i), norms=Pre(norm=rms(hf))
        )

    rope = rope_from(hf, mixer.head_dim)
    layers = layers_of(hf, layer)
    return model(hf, architecture, layers, norm=rms(hf), names=names, max_len=context_of(hf, rope, 32_768))


def _mixer(hf: Reader, *, kv_heads: int | None, head_dim: int | None = None, qwen3: bool, bias: str) -> Attention:
    heads, kv, dim = heads_of(hf, kv_heads=kv_heads, head_dim=head_dim)
    has_bias = hf.get(bool, bias, default=not qwen3)
    return Attention(
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        qkv_bias=has_bias,
        out_bias=has_bias and qwen3,
        qk_norm="head" if qwen3 else None,
        qk_norm_kind=rms(hf) if qwen3 else None,
        position=rope_from(hf, dim),
    )


@family("Qwen2ForCausalLM")
def qwen2(hf: Reader) -> ModelSpec:
    """Qwen1.5, Qwen2, Qwen2.5, QwQ; layers from `max_window_layers` on may slide."""
    first = hf.get(int, "max_window_layers", default=28)
    mixer = _mixer(hf, kv_heads=None, qwen3=False, bias="qkv_bias")
    return _spec(hf, "Qwen2ForCausalLM", mixer, lambda i: _dense(hf), lambda i: i >= first, names())


@family("Qwen2MoeForCausalLM")
def qwen2_moe(hf: Reader) -> ModelSpec:
    """Qwen1.5-MoE and Qwen2-57B-A14B: routed experts plus one shared expert behind a sigmoid gate."""
    last = hf.get(int, "max_window_layers", default=28)
    mixer = _mixer(hf, kv_heads=None, qwen3=False, bias="qkv_bias")
    shared = hf.size("shared_expert_intermediate_size", default=5632)
    ffn = _experts(hf, top_k=4, count=60, width=1408, shared=shared)
    return _spec(hf, "Qwen2MoeForCausalLM", mixer, ffn, lambda i: i % 2 == 0 and i < last, _moe_names())


@family("Qwen3ForCausalLM")
def qwen3(hf: Reader) -> ModelSpec:
    """Qwen3 dense."""
    first = hf.get(int, "max_window_layers", default=28)
    mixer = _mixer(hf, kv_heads=32, head_dim=128, qwen3=True, bias="attention_bias")
    return _spec(hf, "Qwen3ForCausalLM", mixer, lambda i: _dense(hf), lambda i: i >= first, names())


@family("Qwen3MoeForCausalLM")
def qwen3_moe(hf: Reader) -> ModelSpec:
    """Qwen3-30B-A3B and 235B-A22B; a window, when in use, is every layer's."""
    hf.ignore("max_window_layers")
    mixer = _mixer(hf, kv_heads=4, qwen3=True, bias="attention_bias")
    ffn = _experts(hf, top_k=8, count=128, width=768, shared=None)
    return _spec(hf, "Qwen3MoeForCausalLM", mixer, ffn, lambda i: True, _moe_names())
