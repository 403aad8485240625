"""Llama, Mistral, Granite, and what most later families took from Llama: its names, its sizes, its rms norm."""

from __future__ import annotations

from collections.abc import Callable

from ...core.errors import CheckpointError
from ..reader import Reader
from ..spec import (
    Attention,
    DynamicNtk,
    Embedding,
    Gated,
    Head,
    LayerSpec,
    ModelSpec,
    Names,
    Norm,
    Pre,
    Rope,
)
from .registry import family
from .rope import rope_from

LAYER = "model.layers.{i}."

NAMES: dict[str, str] = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layers.{i}.q": LAYER + "self_attn.q_proj",
    "layers.{i}.k": LAYER + "self_attn.k_proj",
    "layers.{i}.v": LAYER + "self_attn.v_proj",
    "layers.{i}.out": LAYER + "self_attn.o_proj",
    "layers.{i}.q_norm": LAYER + "self_attn.q_norm",
    "layers.{i}.k_norm": LAYER + "self_attn.k_norm",
    "layers.{i}.gate": LAYER + "mlp.gate_proj",
    "layers.{i}.up": LAYER + "mlp.up_proj",
    "layers.{i}.down": LAYER + "mlp.down_proj",
    "layers.{i}.norm1": LAYER + "input_layernorm",
    "layers.{i}.norm2": LAYER + "post_attention_layernorm",
}


def names(**changes: str) -> Names:
    """Llama's names with changes; keys are the inner name's last part, e.g. norm2="...ffn_norm"."""
    table = dict(NAMES)
    for key, value in changes.items():
        table["layers.{i}." + key] = LAYER + value
    return Names(table=table, prefix="model.", ignore=("rotary_emb.inv_freq",))


def rms(hf: Reader, default: float = 1e-6) -> Norm:
    """The family's rms norm."""
    return Norm(kind="rms", eps=hf.get(float, "rms_norm_eps", default=default))


def hidden_of(hf: Reader) -> int:
    """The width of the residual stream."""
    return hf.size("hidden_size", "n_embd", "n_embed")


def heads_of(hf: Reader, *, head_dim: int | None = None, kv_heads: int | None = None) -> tuple[int, int, int]:
    """Query heads, key-value heads and head size; the arguments are the family's defaults for absent keys.

    Raises:
        CheckpointError: heads that do not divide.
    """
    heads = hf.size("num_attention_heads", "n_head")
    kv = hf.size("num_key_value_heads", default=kv_heads or heads)
    hidden = hidden_of(hf)
    dim = hf.get(int, "head_dim", default=head_dim)
    if dim is None:
        if hidden % heads:
            raise CheckpointError(f"config.json: hidden size {hidden} is not a multiple of {heads} heads")
        dim = hidden // heads
    if heads % kv:
        raise CheckpointError(f"config.json: {heads} query heads cannot share {kv} key-value heads evenly")
    return heads, kv, dim


def context_of(hf: Reader, rope: Rope | None, default: int = 2048) -> int:
    """The number of positions the model was made for; dynamic NTK stretches it by its factor."""
    limit = hf.size("max_position_embeddings", "n_positions", default=default)
    if rope is not None and isinstance(rope.scaling, DynamicNtk):
        return int(limit * rope.scaling.factor)
    return limit


def window_of(hf: Reader, default: int | None = None) -> int | None:
    """`sliding_window`: null is none, an absent key is the family's default.

    Raises:
        CheckpointError: a window in which a token would not even see itself.
    """
    window = hf.nullable(int, "sliding_window", default=default)
    if window is not None and window < 1:
        raise CheckpointError(f"config.json: 'sliding_window' must be null or at least 1, not {window}")
    return window


def layers_of(hf: Reader, make: Callable[[int], LayerSpec]) -> tuple[LayerSpec, ...]:
    """One LayerSpec for each layer."""
    return tuple(make(i) for i in range(hf.size("num_hidden_layers", "n_layer")))


def layer_types(hf: Reader, default: Callable[[int], bool]) -> list[bool]:
    """For each layer whether it slides; from `layer_types`, else `default(i)`.

    Raises:
        CheckpointError: a list of another length, or a type of layer that Twofold does not know.
    """
    count = hf.size("num_hidden_layers", "n_layer")
    kinds = hf.get(list, "layer_types", default=None)
    if kinds is None:
        return [default(i) for i in range(count)]
    known = {"full_attention": False, "sliding_attention": True}
    if len(kinds) != count or any(kind not in known for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types must name {count} layers as full_attention or sliding_attention, not {kinds}"
        )
    return [known[kind] for kind in kinds]


def model(
    hf: Reader,
    architecture: str,
    layers: tuple[LayerSpec, ...],
    *,
    norm: Norm | None,
    names: Names,
    max_len: int,
    tied: bool = False,
    embedding: Embedding | None = None,
    head_bias: bool = False,
    multiplier: float = 1.0,
    softcap: float | None = None,
) -> ModelSpec:
    """Put the parts together; `tied` is the family's default for an absent `tie_word_embeddings`.

    Raises:
        CheckpointError: a head with a bias whose weight is tied.
    """
    tied = hf.get(bool, "tie_word_embeddings", default=tied)
    if tied and head_bias:
        raise CheckpointError("config.json: a tied head (tie_word_embeddings) with a bias of its own is not supported")
    return ModelSpec(
        architecture=architecture,
        hidden=hidden_of(hf),
        vocab=hf.size("vocab_size"),
        layers=layers,
        norm=norm,
        head=Head(
            tied=tied,
            bias=head_bias,
            multiplier=multiplier,
            softcap=softcap,
        ),
        embedding=embedding or Embedding(),
        names=names,
        max_len=max_len,
    )


@family("LlamaForCausalLM")
def llama(hf: Reader) -> ModelSpec:
    """Llama 1 to 3.3 and the many models saved under its name."""
    heads, kv_heads, head_dim = heads_of(hf)
    bias = hf.get(bool, "attention_bias", default=False)
    rope = rope_from(hf, head_dim)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=bias, out_bias=bias, position=rope)
    ffn = Gated(
        width=hf.size("intermediate_size"),
        act=hf.act("hidden_act", default="silu"),
        bias=hf.get(bool, "mlp_bias", default=False),
    )
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=rms(hf)))
    return model(
        hf,
        "LlamaForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=rms(hf),
        names=names(),
        max_len=context_of(hf, rope),
    )


@family("MistralForCausalLM")
def mistral(hf: Reader) -> ModelSpec:
    """Mistral 7B and its successors with one window for all layers; an absent window is 4096, null is none."""
    heads, kv_heads, head_dim = heads_of(hf, kv_heads=8)
    rope = rope_from(hf, head_dim)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        position=rope,
        window=window_of(hf, 4096),
    )
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=rms(hf)))
    return model(
        hf,
        "MistralForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=rms(hf),
        names=names(),
        max_len=context_of(hf, rope, 131_072),
    )


@family("GraniteForCausalLM")
def granite(hf: Reader) -> ModelSpec:
    """Granite 3: Llama with four multipliers (embedding, attention, residual, logits)."""
    heads, kv_heads, head_dim = heads_of(hf)
    bias = hf.get(bool, "attention_bias", default=False)
    rope = rope_from(hf, head_dim)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        position=rope,
        scale=hf.get(float, "attention_multiplier", default=1.0),
    )
    ffn = Gated(
        width=hf.size("intermediate_size"),
        act=hf.act("hidden_act", default="silu"),
        bias=hf.get(bool, "mlp_bias", default=False),
    )
    layer = LayerSpec(
        mixer=mixer,
        ffn=ffn,
        norms=Pre(norm=rms(hf)),
        residual=hf.get(float, "residual_multiplier", default=1.0),
    )
    return model(
        hf,
        "GraniteForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=rms(hf),
        names=names(),
        max_len=context_of(hf, rope),
        embedding=Embedding(scale=hf.get(float, "embedding_multiplier", default=1.0)),
        multiplier=1.0 / hf.get(float, "logits_scaling", default=1.0),
    )
