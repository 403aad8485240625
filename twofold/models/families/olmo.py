"""OLMo 1 (norms without weights, clipped q, k, v) and OLMo 2 (norms on outputs, and on q and k in full width)."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Gated, LayerSpec, ModelSpec, Norm, PostOutput, Pre
from .llama import context_of, heads_of, layers_of, model, names, rms
from .registry import family
from .rope import rope_from


@family("OlmoForCausalLM")
def olmo(hf: Reader) -> ModelSpec:
    """OLMo 1B and 7B."""
    heads, kv_heads, head_dim = heads_of(hf)
    norm = Norm(kind="layer", eps=1e-5, weight=False)
    bias = hf.get(bool, "attention_bias", default=False)
    rope = rope_from(hf, head_dim)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        position=rope,
        clip_qkv=hf.get(float, "clip_qkv", default=None),
    )
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=norm))
    return model(
        hf,
        "OlmoForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=names(),
        max_len=context_of(hf, rope),
    )


@family("Olmo2ForCausalLM")
def olmo2(hf: Reader) -> ModelSpec:
    """OLMo 2 1B to 32B."""
    heads, kv_heads, head_dim = heads_of(hf)
    norm = rms(hf, 1e-5)
    bias = hf.get(bool, "attention_bias", default=False)
    rope = rope_from(hf, head_dim)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        qk_norm_kind=norm,
        position=rope,
    )
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=PostOutput(norm=norm))
    return model(
        hf,
        "Olmo2ForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=names(norm1="post_attention_layernorm", norm2="post_feedforward_layernorm"),
        max_len=context_of(hf, rope),
    )
