"""The policies of the rollout benchmark, their prompts, and what one step of a run is asked to do."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model import END, tokenizer
from train_shapes import SHAPES as TRAINED

from twofold.models import Decoder, save, spec_from
from twofold.train.init import init_weights

PLACE = Path("~/.cache/twofold/bench")
DONE = ".complete"
ENDS = 64
"""One of so many token ids ends an answer, where answers may end: fresh weights draw each about as often."""
_SMALL = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
POLICIES: dict[str, dict[str, Any]] = {
    # the bundled model's shape
    "small": TRAINED["50M"].config()
    | {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "vocab_size": 4096}
    | _SMALL,
    "50M": TRAINED["50M"].config() | {"use_cache": True},
    "quick": TRAINED["quick"].config()
    | {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 1024}
    | _SMALL,
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step: `prompts` of `length` tokens, `group` answers to each, of `new` tokens at most."""

    prompts: int = 16
    length: int = 64
    group: int = 8
    new: int = 128

    @property
    def answers(self) -> int:
        return self.prompts * self.group

    def told(self) -> str:
        return f"{self.prompts} prompts of {self.length} tokens, {self.group} answers each, up to {self.new} new tokens"

    def texts(self) -> list[str]:
        """The prompts: a blank and two letters are two tokens to model.py's tokenizer, whoever reads them."""
        draw = random.Random(7)
        return [
            "".join(" " + "".join(draw.choices(string.ascii_lowercase, k=2)) for _ in range(self.length // 2))
            for _ in range(self.prompts)
        ]


QUICK = Work(prompts=4, length=16, group=4, new=16)


def make(name: str, models: Path, work: Work) -> Path:
    """The directory of a policy with random fp32 weights, the same on every machine, and the prompts beside them.

    Written first when it is not there whole.
    """
    folder, config = models.expanduser() / f"align-{name}", POLICIES[name] | {"use_cache": True}
    vocab = int(config["vocab_size"])
    recipe = json.dumps([config, ENDS])
    if not ((folder / DONE).is_file() and (folder / DONE).read_text() == recipe):
        decoder = Decoder(spec_from(config), dtype=torch.float32)
        init_weights(decoder, seed=0)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE).unlink(missing_ok=True)
        save(decoder, folder, config=config)
        _write(folder / "tokenizer.json", tokenizer(vocab))
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
        _write(folder / "tokenizer_config.json", words)
        ends = [0, *range(vocab - vocab // ENDS + 1, vocab)]
        _write(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": 0})
        (folder / DONE).write_text(recipe)
    rows = [json.dumps({"prompt": text}) + "\n" for text in work.texts()]
    (folder / prompts_file(work)).write_text("".join(rows))
    return folder


def prompts_file(work: Work) -> str:
    """The name of the prompts of a kind of step, in the policy's directory."""
    return f"prompts-{work.prompts}x{work.length}.jsonl"


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
