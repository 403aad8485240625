"""GPT-2, GPT-J and GPT-NeoX (Pythia): layer norms with biases, plain feed-forwards, three ways to store q, k, v."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Embedding, LayerSpec, Learned, ModelSpec, Names, Norm, Parallel, Plain, Pre, Rope
from .llama import context_of, heads_of, hidden_of, layers_of, model
from .registry import family
from .rope import rope_from

H = "transformer.h.{i}."

GPT2_NAMES = Names(
    table={
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.{i}.qkv": H + "attn.c_attn",
        "layers.{i}.out": H + "attn.c_proj",
        "layers.{i}.up": H + "mlp.c_fc",
        "layers.{i}.down": H + "mlp.c_proj",
        "layers.{i}.norm1": H + "ln_1",
        "layers.{i}.norm2": H + "ln_2",
    },
    layouts={
        "layers.{i}.qkv": "transposed",
        "layers.{i}.out": "transposed",
        "layers.{i}.up": "transposed",
        "layers.{i}.down": "transposed",
    },
    prefix="transformer.",
    ignore=(".attn.bias", ".attn.masked_bias"),
)

GPTJ_NAMES = Names(
    table={
        "embed": "transformer.wte",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "layers.{i}.q": H + "attn.q_proj",
        "layers.{i}.k": H + "attn.k_proj",
        "layers.{i}.v": H + "attn.v_proj",
        "layers.{i}.out": H + "attn.out_proj",
        "layers.{i}.up": H + "mlp.fc_in",
        "layers.{i}.down": H + "mlp.fc_out",
        "layers.{i}.norm1": H + "ln_1",
    },
    prefix="transformer.",
    ignore=(".attn.bias", ".attn.masked_bias"),
)

NEOX = "gpt_neox.layers.{i}."

NEOX_NAMES = Names(
    table={
        "embed": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "layers.{i}.qkv": NEOX + "attention.query_key_value",
        "layers.{i}.out": NEOX + "attention.dense",
        "layers.{i}.up": NEOX + "mlp.dense_h_to_4h",
        "layers.{i}.down": NEOX + "mlp.dense_4h_to_h",
        "layers.{i}.norm1": NEOX + "input_layernorm",
        "layers.{i}.norm2": NEOX + "post_attention_layernorm",
    },
    layouts={"layers.{i}.qkv": "headwise"},
    also={"head": "lm_head"},
    prefix="gpt_neox.",
    ignore=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)


def _norm(hf: Reader) -> Norm:
    return Norm(kind="layer", eps=hf.get(float, "layer_norm_epsilon", "layer_norm_eps", default=1e-5), bias=True)


@family("GPT2LMHeadModel")
def gpt2(hf: Reader) -> ModelSpec:
    """GPT-2 and its relatives; scores may be divided by the layer's number (Mistral-GPT2, ecco)."""
    heads, kv_heads, head_dim = heads_of(hf)
    positions = hf.size("n_positions", "max_position_embeddings", default=1024)
    scale = head_dim**-0.5 if hf.get(bool, "scale_attn_weights", default=True) else 1.0
    by_layer = hf.get(bool, "scale_attn_by_inverse_layer_idx", default=False)
    width = hf.get(int, "n_inner", default=None) or 4 * hidden_of(hf)
    ffn = Plain(width=width, act=hf.act("activation_function", default="gelu_new"), bias=True)

    def layer(i: int) -> LayerSpec:
        mixer = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale / (i + 1) if by_layer else scale,
            qkv_bias=True,
            out_bias=True,
        )
        return LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=_norm(hf)))

    return model(
        hf,
        "GPT2LMHeadModel",
        layers_of(hf, layer),
        norm=_norm(hf),
        names=GPT2_NAMES,
        max_len=positions,
        tied=True,
        embedding=Embedding(positions=Learned(size=positions)),
    )


@family("GPTJForCausalLM")
def gptj(hf: Reader) -> ModelSpec:
    """GPT-J 6B: one norm for attention and feed-forward side by side, interleaved rotary on part of each head."""
    heads, kv_heads, head_dim = heads_of(hf)
    hf.expect("rotary", True)
    hf.expect("scale_attn_weights", True)
    rope = Rope(theta=10_000.0, dim=hf.size("rotary_dim", default=64), interleaved=True)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=rope)
    width = hf.get(int, "n_inner", default=None) or 4 * hidden_of(hf)
    ffn = Plain(width=width, act=hf.act("activation_function", default="gelu_new"), bias=True)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Parallel(norm=_norm(hf), shared=True))
    return model(
        hf,
        "GPTJForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=_norm(hf),
        names=GPTJ_NAMES,
        max_len=context_of(hf, rope),
        head_bias=True,
    )


@family("GPTNeoXForCausalLM")
def gpt_neox(hf: Reader) -> ModelSpec:
    """GPT-NeoX 20B, Pythia, Dolly: attention and feed-forward side by side (or not), each after its own norm."""
    heads, kv_heads, head_dim = heads_of(hf)
    rope = rope_from(hf, head_dim, partial=0.25)
    bias = hf.get(bool, "attention_bias", default=True)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=bias, out_bias=bias, position=rope)
    ffn = Plain(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="gelu"), bias=True)
    parallel = hf.get(bool, "use_parallel_residual", default=True)
    norms = Parallel(norm=_norm(hf), shared=False) if parallel else Pre(norm=_norm(hf))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=norms)
    return model(
        hf,
        "GPTNeoXForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=_norm(hf),
        names=NEOX_NAMES,
        max_len=context_of(hf, rope),
    )
