"""Command R: a parallel block after one norm without bias, interleaved rotary, scaled logits."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Gated, LayerSpec, ModelSpec, Norm, Parallel
from .llama import context_of, heads_of, layers_of, model, names
from .registry import family
from .rope import rope_from


@family("CohereForCausalLM")
def cohere(hf: Reader) -> ModelSpec:
    """Command R and R+ (whose q and k are normed, each head with its own weights), Aya 23."""
    heads, kv_heads, head_dim = heads_of(hf)
    norm = Norm(kind="layer", eps=hf.get(float, "layer_norm_eps", default=1e-5))
    bias = hf.get(bool, "attention_bias", default=False)
    rope = rope_from(hf, head_dim, theta=500_000.0, interleaved=True)
    qk_norm = hf.get(bool, "use_qk_norm", default=False)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="per_head" if qk_norm else None,
        qk_norm_kind=norm if qk_norm else None,
        position=rope,
    )
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Parallel(norm=norm, shared=True))
    return model(
        hf,
        "CohereForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=names(),
        max_len=context_of(hf, rope, 8192),
        tied=True,
        multiplier=hf.get(float, "logit_scale", default=0.0625),
    )
