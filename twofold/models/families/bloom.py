"""BLOOM: ALiBi instead of position vectors, a norm on the embeddings, q, k and v interleaved head by head."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Alibi, Attention, Embedding, LayerSpec, ModelSpec, Names, Norm, Plain, Pre
from .llama import heads_of, hidden_of, layers_of, model
from .registry import family

H = "transformer.h.{i}."

NAMES = Names(
    table={
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.{i}.qkv": H + "self_attention.query_key_value",
        "layers.{i}.out": H + "self_attention.dense",
        "layers.{i}.up": H + "mlp.dense_h_to_4h",
        "layers.{i}.down": H + "mlp.dense_4h_to_h",
        "layers.{i}.norm1": H + "input_layernorm",
        "layers.{i}.norm2": H + "post_attention_layernorm",
    },
    layouts={"layers.{i}.qkv": "headwise"},
    prefix="transformer.",
)


@family("BloomForCausalLM")
def bloom(hf: Reader) -> ModelSpec:
    """BLOOM and BLOOMZ, 560m to 176B; residuals that start after the norm were never released and are refused."""
    heads, kv_heads, head_dim = heads_of(hf)
    hf.expect("n_inner", None, 4 * hidden_of(hf))
    hf.expect("apply_residual_connection_post_layernorm", False)
    norm = Norm(kind="layer", eps=hf.get(float, "layer_norm_epsilon", default=1e-5), bias=True)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=True, out_bias=True, position=Alibi())
    ffn = Plain(width=4 * hidden_of(hf), act="gelu_tanh", bias=True)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=norm))
    return model(
        hf,
        "BloomForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=NAMES,
        max_len=hf.size("seq_length", default=2048),
        tied=True,
        embedding=Embedding(norm=norm),
    )
