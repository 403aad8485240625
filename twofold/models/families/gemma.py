"""Gemma 1, 2 and 3 (text): norms that multiply by 1 + w, embeddings times sqrt(hidden), the head tied to them."""

from __future__ import annotations

import math

from ..reader import Reader
from ..spec import Attention, Embedding, Gated, LayerSpec, ModelSpec, Norm, Pre, Rope, Sandwich
from .llama import context_of, heads_of, layer_types, layers_of, model, names, window_of
from .registry import family
from .rope import rope_from

SANDWICH_NAMES = names(
    norm2="post_attention_layernorm", norm3="pre_feedforward_layernorm", norm4="post_feedforward_layernorm"
)


def _norm(hf: Reader) -> Norm:
    return Norm(kind="rms", eps=hf.get(float, "rms_norm_eps", default=1e-6), offset=True)


def _embedding(hf: Reader) -> Embedding:
    return Embedding(scale=math.sqrt(hf.size("hidden_size")))


@family("GemmaForCausalLM")
def gemma(hf: Reader) -> ModelSpec:
    """Gemma 1; its first configs say "gelu" and mean the tanh form."""
    heads, kv_heads, head_dim = heads_of(hf, head_dim=256)
    bias = hf.get(bool, "attention_bias", default=False)
    rope = rope_from(hf, head_dim)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=bias, out_bias=bias, position=rope)
    hf.expect("hidden_activation", None, "gelu_pytorch_tanh")
    act = hf.act("hidden_act", default="gelu_pytorch_tanh")
    ffn = Gated(width=hf.size("intermediate_size"), act="gelu_tanh" if act == "gelu" else act)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=_norm(hf)))
    return model(
        hf,
        "GemmaForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=_norm(hf),
        names=names(),
        max_len=context_of(hf, rope, 8192),
        tied=True,
        embedding=_embedding(hf),
    )


@family("Gemma2ForCausalLM")
def gemma2(hf: Reader) -> ModelSpec:
    """Gemma 2: four norms a layer, soft caps on scores and logits, every other layer slides."""
    heads, kv_heads, head_dim = heads_of(hf, kv_heads=4, head_dim=256)
    bias = hf.get(bool, "attention_bias", default=False)
    hf.expect("hidden_act", None, "gelu_pytorch_tanh", hf.get(str, "hidden_activation", default="gelu_pytorch_tanh"))
    window = window_of(hf, 4096)
    sliding = layer_types(hf, lambda i: i % 2 == 0)
    rope = rope_from(hf, head_dim)
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_activation", default="gelu_pytorch_tanh"))

    def layer(i: int) -> LayerSpec:
        mixer = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=hf.get(float, "query_pre_attn_scalar", default=256.0) ** -0.5,
            qkv_bias=bias,
            out_bias=bias,
            position=rope,
            window=window if sliding[i] else None,
            softcap=hf.nullable(float, "attn_logit_softcapping", default=50.0),
        )
        return LayerSpec(mixer=mixer, ffn=ffn, norms=Sandwich(norm=_norm(hf)))

    return model(
        hf,
        "Gemma2ForCausalLM",
        layers_of(hf, layer),
        norm=_norm(hf),
        names=SANDWICH_NAMES,
        max_len=context_of(hf, rope, 8192),
        tied=True,
        embedding=_embedding(hf),
        softcap=hf.nullable(float, "final_logit_softcapping", default=30.0),
    )


def _local_rope(hf: Reader, head_dim: int) -> Rope:
    """The sliding layers' rope: their entry in a nested table, else never scaled and with its own base."""
    theta = hf.get(float, "rope_local_base_freq", default=1e4)
    table = hf.get(dict, "rope_parameters", default=None)
    if table is not None and "sliding_attention" in table:
        return rope_from(hf, head_dim, theta=theta, layer_type="sliding_attention")
    return Rope(theta=theta, dim=head_dim)


@family("Gemma3ForCausalLM")
def gemma3(hf: Reader) -> ModelSpec:
    """Gemma 3 (text): norms on each head's q and k, five sliding layers to a full one, a rope for each kind."""
    heads, kv_heads, head_dim = heads_of(hf, kv_heads=4, head_dim=256)
    bias = hf.get(bool, "attention_bias", default=False)
    hf.expect("attn_logit_softcapping", None)
    hf.expect("hidden_act", None, "gelu_pytorch_tanh")
    period = hf.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    sliding = layer_types(hf, lambda i: (i + 1) % period != 0)
    window = window_of(hf, 4096)
    full = rope_from(hf, head_dim, theta=1e6, layer_type="full_attention")
    local = _local_rope(hf, head_dim)
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_activation", default="gelu_pytorch_tanh"))

    def layer(i: int) -> LayerSpec:
        mixer = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=hf.get(float, "query_pre_attn_scalar", default=256.0) ** -0.5,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="head",
            qk_norm_kind=_norm(hf),
            position=local if sliding[i] else full,
            window=window if sliding[i] else None,
        )
        return LayerSpec(mixer=mixer, ffn=ffn, norms=Sandwich(norm=_norm(hf)))

    return model(
        hf,
        "Gemma3ForCausalLM",
        layers_of(hf, layer),
        norm=_norm(hf),
        names=SANDWICH_NAMES,
        max_len=context_of(hf, full, 131_072),
        tied=True,
        embedding=_embedding(hf),
        softcap=hf.nullable(float, "final_logit_softcapping", default=None),
    )
