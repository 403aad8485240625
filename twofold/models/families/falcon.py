"""Falcon: four generations of one block.

    RW 1B            attention then feed-forward, every head its own k and v, ALiBi, biases
    7B               both after one norm, one k and v for all heads, rotary
    40B, 180B        each after its own norm, k and v shared by groups ("new" architecture)
    11B              new architecture, one norm

The reference rounds ALiBi's slopes and products to bfloat16; Twofold keeps them exact.
"""

from __future__ import annotations

from ...core.errors import CheckpointError
from ..reader import Reader
from ..spec import Alibi, Attention, LayerSpec, Layout, ModelSpec, Names, Norm, Parallel, Placement, Plain, Pre
from .llama import context_of, hidden_of, layers_of, model
from .registry import family
from .rope import rope_from

H = "transformer.h.{i}."


def _names(layout: Layout, norm1: str, norm2: str) -> Names:
    return Names(
        table={
            "embed": "transformer.word_embeddings",
            "norm": "transformer.ln_f",
            "head": "lm_head",
            "layers.{i}.qkv": H + "self_attention.query_key_value",
            "layers.{i}.out": H + "self_attention.dense",
            "layers.{i}.up": H + "mlp.dense_h_to_4h",
            "layers.{i}.down": H + "mlp.dense_4h_to_h",
            "layers.{i}.norm1": H + norm1,
            "layers.{i}.norm2": H + norm2,
        },
        layouts={"layers.{i}.qkv": layout},
        prefix="transformer.",
        ignore=("rotary_emb.inv_freq",),
    )


def _placement(hf: Reader, norm: Norm, new: bool) -> tuple[Placement, str, str]:
    """Where the norms stand, and what the first and the second are called."""
    parallel = hf.get(bool, "parallel_attn", default=True)
    count = hf.get(int, "num_ln_in_parallel_attn", default=2 if new else 1)
    if new and not parallel:
        raise CheckpointError("config.json: new_decoder_architecture needs parallel_attn")
    if not parallel:
        return Pre(norm=norm), "input_layernorm", "post_attention_layernorm"
    if count == 2 and new:
        return Parallel(norm=norm, shared=False), "ln_attn", "ln_mlp"
    if count == 1:
        return Parallel(norm=norm, shared=True), "input_layernorm", "input_layernorm"
    raise CheckpointError(
        f"config.json: num_ln_in_parallel_attn is {count}; 1 is allowed, and 2 in the new architecture"
    )


@family("FalconForCausalLM")
def falcon(hf: Reader) -> ModelSpec:
    """All Falcons before Falcon 3 (which is a Llama)."""
    heads = hf.size("num_attention_heads", "n_head")
    head_dim = hidden_of(hf) // heads
    new = hf.get(bool, "new_decoder_architecture", default=False)
    multi_query = hf.get(bool, "multi_query", default=True)
    groups = hf.size("num_kv_heads", "n_head_kv", default=heads)
    kv_heads = groups if new else (1 if multi_query else heads)
    if heads * head_dim != hidden_of(hf) or heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} heads must divide hidden size {hidden_of(hf)}, and {kv_heads} key-value heads them"
        )
    bias = hf.get(bool, "bias", default=False)
    norm = Norm(kind="layer", eps=hf.get(float, "layer_norm_epsilon", default=1e-5), bias=True)
    rope = rope_from(hf, head_dim)
    alibi = hf.get(bool, "alibi", default=False)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        position=Alibi(scale=head_dim**-0.5) if alibi else rope,
    )
    width = hf.get(int, "ffn_hidden_size", default=4 * hidden_of(hf))
    ffn = Plain(width=width, act=hf.act("activation", default="gelu"), bias=bias)
    norms, first, second = _placement(hf, norm, new)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=norms)
    return model(
        hf,
        "FalconForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=_names("grouped" if new or multi_query else "headwise", first, second),
        max_len=context_of(hf, None if alibi else rope),
        tied=True,
    )
