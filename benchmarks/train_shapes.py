"""The decoders of the training benchmark, and what training one takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twofold.models import Decoder, save, spec_from
from twofold.train.init import init_weights

PLACE = Path("~/.cache/twofold/bench")
DONE = ".complete"
RUNTIME = 450 << 20
"""Bytes of a process with torch and an engine in it, before any model; libraries are shared among the ranks."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-shaped decoder, heads of 64, the head tied to the embedding; and one rank's part of a step."""

    name: str
    hidden: int
    width: int
    layers: int
    vocab: int = 32_000
    length: int = 512
    micro: int = 2

    @property
    def parameters(self) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.width + 2 * self.hidden
        return self.layers * layer + self.vocab * self.hidden + self.hidden

    @property
    def tokens(self) -> int:
        """Of a rank and step."""
        return self.length * self.micro

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "max_position_embeddings": self.length,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "use_cache": False,
            "vocab_size": self.vocab,
        }

    def needs(self, stage: int, ranks: int) -> int:
        """Bytes that all ranks of an engine at a ZeRO stage hold at most, roughly and not too few, in fp32.

        Weights, gradients and two states, each divided or not; twenty numbers a token, layer and hidden unit (as wide
        as transformers' feed-forward keeps them), and logits four times.
        """
        whole = 4 * self.parameters
        divided = (0, 2, 2, 4)[stage]
        states = whole * (4 - divided) + whole * divided // ranks
        held = 4 * self.tokens * (self.layers * (14 * self.hidden + 4 * self.width) + 4 * self.vocab)
        return ranks * (states + held + RUNTIME)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="50M", hidden=512, width=1536, layers=10),
        Shape(name="300M", hidden=1024, width=3072, layers=20),
        Shape(name="quick", hidden=256, width=768, layers=4, vocab=8_000, length=128),
    )
}


def make(shape: Shape, models: Path) -> Path:
    """The directory of a decoder with random fp32 weights, written first when it is not there whole."""
    folder, recipe = models.expanduser() / f"train-{shape.name}", json.dumps(shape.config())
    if (folder / DONE).is_file() and (folder / DONE).read_text() == recipe:
        return folder
    decoder = Decoder(spec_from(shape.config()), dtype=torch.float32)
    init_weights(decoder, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    save(decoder, folder, config=shape.config())
    (folder / DONE).write_text(recipe)
    return folder
