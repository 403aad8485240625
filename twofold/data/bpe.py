"""A byte-level BPE vocabulary trained on sources, written as a folder that any Hugging Face tool reads.

Deterministic: documents come in a fixed order, and the trainer breaks ties by the pieces themselves.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..core import ConfigError
from .dataset import Chat, Completion, Document, Text, documents

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Words with their underscores, numbers of at most three digits, other signs, each with at most one space in front;
# newlines; other white space. A line's indentation is a piece of its own, so that a prompt may end before or after it.
_PIECES = r"\n+| ?_*[A-Za-z]+| ?\d{1,3}| ?[^\sA-Za-z\d_]+|_+|[^\S\n]+"


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """What a tokenizer is trained on and how large it becomes; the keys of a recipe's [tokenizer] table."""

    sources: tuple[str, ...]
    size: int = 4096
    min_frequency: int = 2
    context: int = 512
    """`model_max_length` of the written tokenizer_config.json."""

    def __post_init__(self) -> None:
        if not 256 + len(SPECIAL) <= self.size <= 2**20:
            raise ConfigError(f"size must be from {256 + len(SPECIAL)} (every byte) to {2**20}, not {self.size}")
        if not self.sources:
            raise ConfigError("sources is empty: name at least one file, folder, glob or named source")


def train_tokenizer(config: VocabularyConfig, folder: Path) -> None:
    """Train a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) and write it to `folder`.

    The folder appears whole or not at all.

    Held-out documents are not told apart here: a vocabulary knows how often pieces occur and nothing of their order.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.size,
        min_frequency=config.min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(config.sources), trainer)
    unfinished = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        backend.save(str(unfinished / "tokenizer.json"))
        for name, table in _settings(config.context).items():
            (unfinished / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _settings(context: int) -> dict[str, dict[str, object]]:
    end, _, turn = SPECIAL
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": turn,
            "pad_token": end,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        },
        "generation_config.json": {
            "do_sample": False,  # a model as small as its vocabulary is at its best when greedy
            "eos_token_id": [SPECIAL.index(turn), SPECIAL.index(end)],
            "pad_token_id": SPECIAL.index(end),
        },
    }


def _texts(sources: Sequence[str]) -> Iterator[str]:
    for source in sources:
        for document in documents(source):
            yield from _parts(document)


def _parts(document: Document) -> list[str]:
    match document.content:
        case Text(text):
            return [text]
        case Completion(prompt, completion):
            return [prompt, completion]
        case Chat(messages):
            return [str(message["content"] or "") for message in messages]
        case other:
            raise ConfigError(f"a vocabulary is made of text, not of rows that are {type(other).__name__.lower()}")
