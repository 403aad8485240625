"""Tiny random encoders made by transformers, in the zoo's style: odd sizes, every variant that changes the maths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

BERT = {
    "vocab_size": 103,
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
ROBERTA = BERT | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
MODERN = BERT | {"num_hidden_layers": 5, "local_attention": 12, "max_position_embeddings": 256}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One encoder: its architecture, and the settings of its config."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)


def _v(architecture: str, base: dict[str, Any], **changes: Any) -> Variant:
    return Variant(architecture=architecture, config=base | changes)


ZOO: dict[str, Variant] = {
    "bert": _v("BertModel", BERT),
    "bert-relu-types": _v("BertModel", BERT, hidden_act="relu", type_vocab_size=3, layer_norm_eps=1e-5),
    "bert-classifier": _v("BertForSequenceClassification", BERT, num_labels=3),
    "bert-cross": _v("BertForSequenceClassification", BERT, num_labels=1),
    "bert-tagger": _v("BertForTokenClassification", BERT, num_labels=5),
    "roberta": _v("RobertaModel", ROBERTA),
    "roberta-classifier": _v("RobertaForSequenceClassification", ROBERTA, num_labels=2),
    "roberta-tagger": _v("RobertaForTokenClassification", ROBERTA, num_labels=3),
    "xlm-roberta": _v("XLMRobertaModel", ROBERTA),
    "xlm-roberta-cross": _v("XLMRobertaForSequenceClassification", ROBERTA, num_labels=1),
    "xlm-roberta-tagger": _v("XLMRobertaForTokenClassification", ROBERTA, num_labels=4),
    "modernbert": _v("ModernBertModel", MODERN),
    "modernbert-biases": _v(
        "ModernBertModel",
        MODERN,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 3e3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e2},
        },
    ),
    "modernbert-classifier": _v("ModernBertForSequenceClassification", MODERN, num_labels=3),
    "modernbert-mean": _v(
        "ModernBertForSequenceClassification",
        MODERN,
        num_labels=1,
        classifier_pooling="mean",
        classifier_bias=True,
        norm_bias=True,
        classifier_activation="relu",
    ),
    "modernbert-tagger": _v("ModernBertForTokenClassification", MODERN, num_labels=4),
}


def build(variant: Variant) -> transformers.PreTrainedModel:
    """The random model of a variant."""
    cls = getattr(transformers, variant.architecture)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = cls(cls.config_class(**ids | variant.config)).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, variant.architecture)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower()
            if parameter.dim() == 1 or is_norm:
                parameter.copy_(0.3 * noise + (1.0 if is_norm and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(0.2 * noise)
    return model


def save(variant: Variant, path: Path) -> transformers.PreTrainedModel:
    """Build a variant, write it as transformers does, and give it back."""
    model = build(variant)
    model.save_pretrained(path)
    return model


def texts_of(variant: Variant, *lengths: int) -> list[list[int]]:
    """Lists of ids without padding's and RoBERTa's, the same at each call."""
    generator = torch.Generator().manual_seed(len(lengths))
    vocab = variant.config["vocab_size"]
    return [torch.randint(4, vocab, (length,), generator=generator).tolist() for length in lengths]
