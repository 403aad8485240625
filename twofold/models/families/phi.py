"""Phi 1 and 2 (a parallel block with biases everywhere), Phi-3 and Phi-4 (Llama with fused weights and LongRoPE)."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Gated, LayerSpec, ModelSpec, Names, Norm, Parallel, Plain, Pre
from .llama import LAYER, NAMES, context_of, heads_of, layers_of, model, names, rms, window_of
from .registry import family
from .rope import rope_from

PHI_NAMES = Names(
    table=NAMES
    | {
        "norm": "model.final_layernorm",
        "layers.{i}.out": LAYER + "self_attn.dense",
        "layers.{i}.q_norm": LAYER + "self_attn.q_layernorm",
        "layers.{i}.k_norm": LAYER + "self_attn.k_layernorm",
        "layers.{i}.up": LAYER + "mlp.fc1",
        "layers.{i}.down": LAYER + "mlp.fc2",
    },
    prefix="model.",
    ignore=("rotary_emb.inv_freq",),
)


@family("PhiForCausalLM")
def phi(hf: Reader) -> ModelSpec:
    """Phi-1, 1.5 and 2: attention and feed-forward side by side after one norm, half of each head rotates."""
    heads, kv_heads, head_dim = heads_of(hf)
    norm = Norm(kind="layer", eps=hf.get(float, "layer_norm_eps", default=1e-5), bias=True)
    rope = rope_from(hf, head_dim, partial=0.5)
    qk_norm = hf.get(bool, "qk_layernorm", default=False)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=True,
        out_bias=True,
        qk_norm="head" if qk_norm else None,
        qk_norm_kind=norm if qk_norm else None,
        position=rope,
    )
    ffn = Plain(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="gelu_new"), bias=True)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Parallel(norm=norm, shared=True))
    return model(
        hf,
        "PhiForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=PHI_NAMES,
        max_len=context_of(hf, rope),
        head_bias=True,
    )


@family("Phi3ForCausalLM")
def phi3(hf: Reader) -> ModelSpec:
    """Phi-3, Phi-3.5 and Phi-4 (mini): q, k, v in one tensor, gate and up in another."""
    heads, kv_heads, head_dim = heads_of(hf)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        hf.expect(key, False, None)
    for key in ("full_attn_mod", "interpolate_factor"):
        hf.expect(key, 1, None)
    rope = rope_from(hf, head_dim, partial=1.0)
    hf.ignore("original_max_position_embeddings")
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        position=rope,
        window=window_of(hf),
    )
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=rms(hf, 1e-5)))
    base = names(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")
    return model(
        hf,
        "Phi3ForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=rms(hf, 1e-5),
        names=base,
        max_len=context_of(hf, rope, 4096),
    )
