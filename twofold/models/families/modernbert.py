"""ModernBERT: an encoder with rotary positions, gated feed-forwards, and windows in two layers of three."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Embedding, Gated, LayerSpec, ModelSpec, Names, Norm, Pre, PreFfn, ScoreInput
from .bert import scoring
from .llama import context_of, heads_of, layer_types, layers_of
from .registry import encoder
from .rope import rope_from

LAYER = "layers.{i}."
TABLE = {
    "embed": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "norm": "final_norm",
    "layers.{i}.qkv": LAYER + "attn.Wqkv",
    "layers.{i}.out": LAYER + "attn.Wo",
    "layers.{i}.norm1": LAYER + "attn_norm",
    "layers.{i}.gate_up": LAYER + "mlp.Wi",
    "layers.{i}.down": LAYER + "mlp.Wo",
    "layers.{i}.norm2": LAYER + "mlp_norm",
}


def _spec(hf: Reader, architecture: str) -> ModelSpec:
    heads, kv_heads, head_dim = heads_of(hf)
    hf.ignore("tie_word_embeddings", "decoder_bias", "mlp_dropout", "initializer_cutoff_factor", "cls_token_id")
    hf.ignore("deterministic_flash_attn", "reference_compile", "repad_logits_with_grad", "sparse_prediction")
    hf.ignore("sparse_pred_ignore_index", "position_embedding_type", "layer_norm_eps")
    hf.ignore("classifier_pooling", "classifier_bias", "classifier_activation")
    every = hf.size("global_attn_every_n_layers", default=3)
    sliding = layer_types(hf, lambda i: i % every != 0)
    window = hf.size("local_attention", default=128) // 2 + 1
    whole, local = (
        rope_from(hf, head_dim, theta=hf.get(float, key, default=theta), layer_type=kind)
        for key, theta, kind in (
            ("global_rope_theta", 160_000.0, "full_attention"),
            ("local_rope_theta", 10_000.0, "sliding_attention"),
        )
    )
    norm, bias = _norm(hf), hf.get(bool, "attention_bias", default=False)
    ffn = Gated(
        width=hf.size("intermediate_size", default=1152),
        act=hf.act("hidden_activation", default="gelu"),
        bias=hf.get(bool, "mlp_bias", default=False),
    )

    def layer(i: int) -> LayerSpec:
        mixer = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qkv_bias=bias,
            out_bias=bias,
            position=local if sliding[i] else whole,
            window=window if sliding[i] else None,
            causal=False,
        )
        return LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=norm) if i else PreFfn(norm=norm))

    base = "" if architecture.endswith("Model") else "model."
    table = {key: base + name for key, name in TABLE.items()}
    also = {} if base else {key: "model." + name for key, name in TABLE.items()}
    return ModelSpec(
        architecture=architecture,
        hidden=hf.size("hidden_size"),
        vocab=hf.size("vocab_size"),
        layers=layers_of(hf, layer),
        norm=norm,
        head=None,
        embedding=Embedding(norm=norm),
        names=Names(table=table, also=also, prefix=base),
        max_len=context_of(hf, whole, 8192),
    )


def _norm(hf: Reader) -> Norm:
    return Norm(
        kind="layer", eps=hf.get(float, "norm_eps", default=1e-5), bias=hf.get(bool, "norm_bias", default=False)
    )


def _classifier(hf: Reader, architecture: str, each: bool) -> ModelSpec:
    of = "each" if each else hf.get(str, "classifier_pooling", default="cls")
    hf.expect("classifier_pooling", "cls", "mean")
    reads = ScoreInput(
        of="each" if each else "mean" if of == "mean" else "cls",
        dense=True,
        dense_bias=hf.get(bool, "classifier_bias", default=False),
        act=hf.act("classifier_activation", default="gelu"),
        norm=_norm(hf),
        bias=True,
    )
    spec = _spec(hf, architecture)
    return scoring(spec, hf, reads, score="classifier", score_dense="head.dense", score_norm="head.norm")


@encoder("ModernBertModel")
def modernbert(hf: Reader) -> ModelSpec:
    """ModernBERT base and large, and the embedding models made of them."""
    return _spec(hf, "ModernBertModel")


@encoder("ModernBertForSequenceClassification")
def modernbert_classifier(hf: Reader) -> ModelSpec:
    """ModernBERT as a classifier or cross-encoder: the first token or the mean of all, a dense layer, the labels."""
    return _classifier(hf, "ModernBertForSequenceClassification", each=False)


@encoder("ModernBertForTokenClassification")
def modernbert_tagger(hf: Reader) -> ModelSpec:
    """ModernBERT that gives each token its labels."""
    return _classifier(hf, "ModernBertForTokenClassification", each=True)
