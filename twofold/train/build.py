"""From a recipe to what a run works with; the order of composition is fixed here and nowhere else.

words (tokenizer, template) -> data -> where things are kept -> spec -> decoder -> weights (fresh, from a directory,
from a checkpoint) -> recompute -> optimizer (launch.py)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core import ConfigError
from ..data import ChatTemplate, PackedLoader, Tokenizer, prepare
from ..data.bpe import train_tokenizer
from ..models import weights
from ..models.decoder import Decoder
from ..models.layout import matrices
from . import kept
from .axes import Axes
from .checkpoint import copy_files
from .config import Recipe
from .init import init_weights
from .offload import Offload
from .optimizer import Optimizer
from .peers import peers_of
from .recompute import recompute_layers
from .scaler import LossScaler
from .trainer import Data

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class RecipeWords:
    """The recipe's tokenizer; in a chat recipe a sample prompt is what the user says."""

    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids

    def prompt(self, text: str) -> list[int]:
        """The ids of a sample prompt."""
        if self.template is None:
            return self.tokenizer.encode_prompt(text)
        return self.template.encode(self.tokenizer, [{"role": "user", "content": text}])

    def text(self, ids: list[int]) -> str:
        """What the model answered."""
        return self.tokenizer.decode(ids)


def build_words(recipe: Recipe) -> RecipeWords:
    """The tokenizer (trained now if the recipe says how and it is not there), and for a chat recipe its template."""
    folder = recipe.model.tokenizer_dir
    if recipe.tokenizer and not folder.exists():
        train_tokenizer(recipe.tokenizer, folder)
    return RecipeWords(Tokenizer.load(folder), ChatTemplate.load(folder) if recipe.kind == "chat" else None)


def build_data(recipe: Recipe, words: RecipeWords) -> tuple[Data, str]:
    """Training batches by number and the fixed held-out ones, and a fingerprint of all that they are made of."""
    config, folder = recipe.data, recipe.run.output / "data"
    fraction = 0.0 if config.valid else config.valid_fraction
    split = prepare(config.train, words.tokenizer, folder, template=words.template, valid_fraction=fraction)
    held_out, fingerprint = split.valid, split.fingerprint
    if config.valid:
        other = prepare(config.valid, words.tokenizer, folder, template=words.template)
        held_out, fingerprint = other.train, f"{fingerprint}+{other.fingerprint}"
    train = PackedLoader(
        split.train, seq_len=config.seq_len, tokens_per_batch=config.tokens_per_step, seed=recipe.run.seed
    )
    valid = []
    if held_out.tokens > len(held_out):
        loader = PackedLoader(held_out, seq_len=config.seq_len, tokens_per_batch=config.tokens_per_step)
        valid = list(loader.once(recipe.run.eval_batches))
    return Data(train=train, valid=valid), fingerprint


def build_offload(recipe: Recipe) -> Offload:
    """Where the run keeps what it is not working on; files are in its output when the recipe names no directory."""
    return Offload(recipe.offload, recipe.run.output)


def build_model(recipe: Recipe, checkpoint: Path | None, offload: Offload) -> Decoder:
    """The decoder with its weights: those of `checkpoint` when a run goes on, else as the recipe begins.

    Raises:
        CheckpointError: the directory cannot be read, or the config describes no model of ours.
        ConfigError: sequences longer than the model's context.
    """
    config, dtype = recipe.model, DTYPES[recipe.model.dtype]
    source = checkpoint or config.from_
    if source is not None:
        memory = offload.place_weights if offload.keeps_weights else None
        decoder = weights.load(source, dtype=dtype, sparse=config.sparse_attention, memory=memory)
    else:
        device = "meta" if offload.keeps_weights else "cpu"
        decoder = Decoder(weights.spec_from(hf_config(recipe)), dtype=dtype, device=device)
        if offload.keeps_weights:
            offload.place_weights(decoder)
        init_weights(decoder, recipe.run.seed, offload.let_go)
    if recipe.data.seq_len > decoder.max_len:
        raise ConfigError(
            f"data.seq_len is {recipe.data.seq_len}, the model's context {decoder.max_len}: shorten the one or "
            "raise max_position_embeddings"
        )
    keeper = None if config.activations == "device" else kept.keeper(config.activations, recipe.run.output)
    recompute_layers(decoder, config.recompute, config.recompute_layers, keeper)
    return decoder


def build_optimizer(
    decoder: Decoder, recipe: Recipe, axes: Axes | None = None, offload: Offload | None = None
) -> Optimizer:
    """The recipe's rule over this rank's part of the decoder, which `axes` divided and Zero, if it does, has sliced."""
    axes = axes or Axes()
    named = dict(decoder.named_parameters())
    whole = Decoder(axes.tensor.whole, device="meta") if axes.tensor else decoder
    peers = peers_of(named, axes.tensor)
    return Optimizer(
        named.items(), recipe.optimizer, matrices=matrices(whole), peers=peers, norm=axes.norm, offload=offload
    )


def build_scaler(recipe: Recipe) -> LossScaler:
    """The loss scale of an fp16 run; of the others it is 1."""
    return LossScaler(recipe.fp16 if recipe.model.dtype == "fp16" else None)


def check_vocabulary(decoder: Decoder, words: RecipeWords) -> None:
    """Raises ConfigError when the tokenizer has ids that the model's embedding has not."""
    have, need = decoder.spec.vocab, words.tokenizer.vocab_size
    if need > have:
        raise ConfigError(f"the tokenizer has {need} ids, the model {have}: raise vocab_size to at least {need}")


def hf_config(recipe: Recipe) -> dict[str, Any]:
    """The config.json that this run's checkpoints carry."""
    config, sparse = recipe.model.config, recipe.model.sparse_attention
    if config is None:
        assert recipe.model.from_ is not None
        config = weights.read_config(recipe.model.from_)
    return config if sparse is None else config | {weights.SPARSE: sparse}


def writer(decoder: Decoder, recipe: Recipe, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    """A function that fills a directory with the model as Hugging Face lays it out, tokenizer included."""
    config = hf_config(recipe)

    def write(directory: Path) -> None:
        weights.save(decoder, directory, config=config, dtype=dtype)
        copy_files(recipe.model.tokenizer_dir, directory, TOKENIZER_FILES)

    return write


def exporter(decoder: Decoder, recipe: Recipe) -> Callable[[Path], None]:
    """`writer` for the finished model, its weights in the recipe's `export_dtype`."""
    return writer(decoder, recipe, DTYPES[recipe.run.export_dtype])
