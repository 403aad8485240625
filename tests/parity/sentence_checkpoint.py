"""Small encoders and decoders with a tokenizer and sentence-transformers' files, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.parity import encoder_zoo, zoo

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps for a while.",
    "A search engine ranks documents by how well they answer a question.",
    "Vectors of like texts point the same way; those of others do not.",
    "def add(a, b): return a + b",
]
TEXTS = [
    "the quick brown fox",
    "a lazy dog sleeps",
    "documents and questions",
    "Vectors, vectors, and more vectors; texts, texts, and a very long sentence about a fox that answers questions.",
]


def tokenizer(folder: Path) -> int:
    """A WordPiece tokenizer as BERT's, pairs with types included; how many tokens it has."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=180, special_tokens=special, show_progress=False)
    )
    ids = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]"}
    settings = names | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made.get_vocab_size()


def encoder(folder: Path, variant: str, **config: Any) -> transformers.PreTrainedModel:
    """A variant of the encoders' zoo, with that tokenizer."""
    size = tokenizer(folder)
    base = encoder_zoo.ZOO[variant]
    changed = base.config | {"vocab_size": size, "pad_token_id": 0} | config
    return encoder_zoo.save(encoder_zoo.Variant(architecture=base.architecture, config=changed), folder)


def decoder(folder: Path, architecture: str = "Qwen3ForCausalLM", **config: Any) -> transformers.PreTrainedModel:
    """A decoder with that tokenizer, whose texts end in [SEP]."""
    size = tokenizer(folder)
    changed = zoo.ZOO["qwen3"].config | {"vocab_size": size} | config
    return zoo.save(zoo.Variant(architecture=architecture, config=changed), folder)


def sentences(
    folder: Path, mode: str, *, normalize: bool = True, dense: tuple[int, int] | None = None, **told: Any
) -> torch.nn.Linear | None:
    """sentence-transformers' files beside a model; the matrix of its Dense module, of (inputs, outputs)."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    pooling = {f"pooling_mode_{name}": name == mode for name in modes} | {"word_embedding_dimension": 40}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    linear = None
    if dense is not None:
        torch.manual_seed(2)
        linear = torch.nn.Linear(*dense)
        steps.append(("Dense", "2_Dense"))
        (folder / "2_Dense").mkdir()
        config = {"in_features": dense[0], "out_features": dense[1], "bias": True}
        config |= {"activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
        tensors = {f"linear.{name}": x.detach() for name, x in linear.named_parameters()}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
    if normalize:
        steps.append(("Normalize", f"{len(steps)}_Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "cosine"} | told))
    return linear
