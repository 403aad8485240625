"""StableLM: layer norms, a quarter of each head rotates; the 12B norms each head's q and k with its own weights."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Gated, LayerSpec, ModelSpec, Norm, Parallel, Pre
from .llama import context_of, heads_of, layers_of, model, names
from .registry import family
from .rope import rope_from


@family("StableLmForCausalLM")
def stablelm(hf: Reader) -> ModelSpec:
    """StableLM 3B, StableLM 2 1.6B and 12B."""
    heads, kv_heads, head_dim = heads_of(hf)
    eps = hf.get(float, "layer_norm_eps", "norm_eps", default=1e-5)
    norm = Norm(kind="layer", eps=eps, bias=True)
    rope = rope_from(hf, head_dim, partial=0.25)
    qk_norm = hf.get(bool, "qk_layernorm", default=False)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=hf.get(bool, "use_qkv_bias", default=False),
        qk_norm="per_head" if qk_norm else None,
        qk_norm_kind=Norm(kind="layer", eps=eps) if qk_norm else None,
        position=rope,
    )
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    parallel = hf.get(bool, "use_parallel_residual", default=False)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Parallel(norm=norm, shared=True) if parallel else Pre(norm=norm))
    return model(
        hf,
        "StableLmForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=names(q_norm="self_attn.q_layernorm.norms.{h}", k_norm="self_attn.k_layernorm.norms.{h}"),
        max_len=context_of(hf, rope, 4096),
    )
