"""Tiny tokenizers made on the spot, one for each way in which vocabularies spell bytes."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from twofold.data import Tokenizer as TwofoldTokenizer

TEXT = ["hello world, how are you?", "def f(x):\n    return x + 1\n", "naïve café — 数 🙂 ok", "<|im_end|> user"] * 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def sentencepiece_like() -> Tokenizer:
    """As Llama 2: spaces are ▁, one in front of the text, unknown characters fall back to bytes."""
    words = ["▁hello", "▁world", "hel", "lo", "▁a", "▁", "a", "b", "é", "x", ",", "o", "l", "h", "e"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("h", "e"), ("he", "l"), ("l", "o"), ("hel", "lo"), ("▁", "hello"), ("▁", "a")]
    vocab += ["he", "hello"]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace() -> Tokenizer:
    """A unigram vocabulary, whose model itself holds the special tokens."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁hello", -2.0), ("▁world", -2.1), ("▁", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/|_"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def save(backend: Tokenizer, folder: Path, **settings: object) -> TwofoldTokenizer:
    """Write a model folder with this tokenizer and load it as Twofold does."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return TwofoldTokenizer.load(folder)
