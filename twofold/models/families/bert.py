"""BERT, RoBERTa, XLM-RoBERTa: encoders with learned positions, token types, and a norm after each residual.

The pooler of a bare model was trained to tell whether two sentences follow one another, and nothing reads it; that of a
classifier stands before its score head. RoBERTa's positions begin behind that of padding.
"""

from __future__ import annotations

from dataclasses import replace

from ..reader import Reader
from ..spec import (
    Attention,
    Embedding,
    LayerSpec,
    Learned,
    ModelSpec,
    Names,
    Norm,
    Plain,
    PostResidual,
    ScoreInput,
)
from .labels import labels_of
from .llama import heads_of, layers_of
from .registry import encoder

LAYER = "encoder.layer.{i}."
TABLE = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layers.{i}.q": LAYER + "attention.self.query",
    "layers.{i}.k": LAYER + "attention.self.key",
    "layers.{i}.v": LAYER + "attention.self.value",
    "layers.{i}.out": LAYER + "attention.output.dense",
    "layers.{i}.norm1": LAYER + "attention.output.LayerNorm",
    "layers.{i}.up": LAYER + "intermediate.dense",
    "layers.{i}.down": LAYER + "output.dense",
    "layers.{i}.norm2": LAYER + "output.LayerNorm",
}
UNREAD = ("pooler.dense.weight", "pooler.dense.bias")
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids")
OLD = {"weight": "gamma", "bias": "beta"}
"""What the first checkpoints call the numbers of a norm."""


def _spec(hf: Reader, architecture: str, base: str, offset: int) -> ModelSpec:
    """The encoder without a head; `base` is how classifiers' checkpoints call it."""
    heads, kv_heads, head_dim = heads_of(hf)
    hf.expect("position_embedding_type", "absolute", None)
    hf.expect("is_decoder", False)
    hf.ignore("tie_word_embeddings", "directionality", "pooler_fc_size", "pooler_num_attention_heads")
    hf.ignore("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type")
    norm = Norm(kind="layer", eps=hf.get(float, "layer_norm_eps", default=1e-12), bias=True)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=True, out_bias=True, causal=False)
    ffn = Plain(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="gelu"), bias=True)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=PostResidual(norm=norm))
    size = hf.size("max_position_embeddings", default=512) - offset
    bare = architecture.endswith("Model")
    if bare:
        names = Names(
            table=TABLE,
            also={key: base + name for key, name in TABLE.items()},
            ignore=(*IGNORED, *UNREAD),
        )
    else:
        table = {key: base + name for key, name in TABLE.items()}
        norms = {key: name for key, name in table.items() if "norm" in key}
        old = {f"{key}.{kind}": f"{name}.{OLD[kind]}" for key, name in norms.items() for kind in OLD}
        names = Names(table=table, also=old, prefix=base, ignore=IGNORED)
    return ModelSpec(
        architecture=architecture,
        hidden=hf.size("hidden_size"),
        vocab=hf.size("vocab_size"),
        layers=layers_of(hf, lambda i: layer),
        norm=None,
        head=None,
        embedding=Embedding(
            positions=Learned(size=size, offset=offset), types=hf.size("type_vocab_size", default=2), norm=norm
        ),
        names=names,
        max_len=size,
    )


def scoring(spec: ModelSpec, hf: Reader, reads: ScoreInput, **table: str) -> ModelSpec:
    """An encoder with a score head; `table` names its tensors."""
    names = replace(spec.names, table=spec.names.table | table)
    return replace(spec, score=labels_of(hf), score_input=reads, names=names)


@encoder("BertModel")
def bert(hf: Reader) -> ModelSpec:
    """BERT and the many sentence encoders that were made of it: MiniLM, BGE, E5, GTE."""
    return _spec(hf, "BertModel", "bert.", 0)


@encoder("BertForSequenceClassification")
def bert_classifier(hf: Reader) -> ModelSpec:
    """BERT as a classifier or cross-encoder: the first token's pooler, then the labels."""
    spec = _spec(hf, "BertForSequenceClassification", "bert.", 0)
    reads = ScoreInput(of="cls", dense=True, bias=True)
    return scoring(spec, hf, reads, score="classifier", score_dense="bert.pooler.dense")


@encoder("BertForTokenClassification")
def bert_tagger(hf: Reader) -> ModelSpec:
    """BERT that gives each token its labels."""
    spec = _spec(hf, "BertForTokenClassification", "bert.", 0)
    return scoring(spec, hf, ScoreInput(of="each", bias=True), score="classifier")


def _roberta(hf: Reader, architecture: str) -> ModelSpec:
    return _spec(hf, architecture, "roberta.", hf.get(int, "pad_token_id", default=1) + 1)


def _roberta_classifier(hf: Reader, architecture: str) -> ModelSpec:
    reads = ScoreInput(of="cls", dense=True, bias=True)
    spec = _roberta(hf, architecture)
    return scoring(spec, hf, reads, score="classifier.out_proj", score_dense="classifier.dense")


def _roberta_tagger(hf: Reader, architecture: str) -> ModelSpec:
    return scoring(_roberta(hf, architecture), hf, ScoreInput(of="each", bias=True), score="classifier")


@encoder("RobertaModel")
def roberta(hf: Reader) -> ModelSpec:
    """RoBERTa: BERT whose positions begin at padding's id + 1."""
    return _roberta(hf, "RobertaModel")


@encoder("RobertaForSequenceClassification")
def roberta_classifier(hf: Reader) -> ModelSpec:
    """RoBERTa as a classifier or cross-encoder."""
    return _roberta_classifier(hf, "RobertaForSequenceClassification")


@encoder("RobertaForTokenClassification")
def roberta_tagger(hf: Reader) -> ModelSpec:
    """RoBERTa that gives each token its labels."""
    return _roberta_tagger(hf, "RobertaForTokenClassification")


@encoder("XLMRobertaModel")
def xlm_roberta(hf: Reader) -> ModelSpec:
    """XLM-RoBERTa: multilingual E5, BGE-M3's dense vectors."""
    return _roberta(hf, "XLMRobertaModel")


@encoder("XLMRobertaForSequenceClassification")
def xlm_roberta_classifier(hf: Reader) -> ModelSpec:
    """XLM-RoBERTa as a classifier or cross-encoder: the BGE rerankers."""
    return _roberta_classifier(hf, "XLMRobertaForSequenceClassification")


@encoder("XLMRobertaForTokenClassification")
def xlm_roberta_tagger(hf: Reader) -> ModelSpec:
    """XLM-RoBERTa that gives each token its labels."""
    return _roberta_tagger(hf, "XLMRobertaForTokenClassification")
