"""From a recipe to what a run works with; the order of composition is fixed here and nowhere else.

words (tokenizer, template) -> data -> where things are kept -> spec -> decoder (of a tensor parallel rank, of a stage)
-> recompute -> ZeRO -> weights (fresh, from a directory, from a checkpoint) -> optimizer (launch.py). One process has
its weights first, since nothing divides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError
from ..data import ChatTemplate, Corpus, PackedLoader, Tokenizer, prepare
from ..data.bpe import train_tokenizer
from ..models import weights
from ..models.decoder import Decoder
from ..models.draft_head import config_for, digest
from ..models.layout import matrices
from ..models.lora import adapt
from ..models.lora import matrices as adapter_matrices
from ..models.scoring import as_critic, as_reward
from ..models.spec import ModelSpec
from ..models.whole import WholeParameters
from ..parallel import Mesh
from . import adapters, kept
from .axes import Axes
from .config import Recipe
from .files import AdapterFiles, Files, ModelFiles
from .init import FirstWeights, init_weights
from .offload import Offload
from .optimizer import Optimizer
from .peers import peers_of
from .pieces import Held
from .places import Places
from .recompute import recompute_layers
from .scaler import LossScaler
from .state import Value, fill, saved
from .trainer import Data
from .zero import Zero

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    if recipe.model.from_ is not None:
        weights.read_config(recipe.model.from_)  # what is no model is told of as that, not for the words it lacks
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
    train = _packed(recipe, split.train)
    valid = []
    if held_out.tokens > len(held_out):
        loader = PackedLoader(held_out, seq_len=config.seq_len, tokens_per_batch=config.tokens_per_step)
        valid = list(loader.once(recipe.run.eval_batches))
    return Data(train=train, valid=valid), fingerprint


def text_loader(recipe: Recipe, words: RecipeWords, sources: Sequence[str]) -> tuple[PackedLoader, str]:
    """Batches of other texts than the recipe's own, and their fingerprint."""
    split = prepare(sources, words.tokenizer, recipe.run.output / "text", template=words.template)
    return _packed(recipe, split.train), split.fingerprint


def _packed(recipe: Recipe, corpus: Corpus) -> PackedLoader:
    config = recipe.data
    return PackedLoader(corpus, seq_len=config.seq_len, tokens_per_batch=config.tokens_per_step, seed=recipe.run.seed)


def build_offload(recipe: Recipe, mesh: Mesh) -> Offload:
    """Where a rank keeps what it is not working on; files are in the run's output when the recipe names no place."""
    output = recipe.run.output
    folder = output if mesh.alone else output / f"rank-{mesh.rank_in_world}"
    if "disk" in recipe.offload.places and recipe.offload.directory is None:
        folder.mkdir(parents=True, exist_ok=True)
    return Offload(recipe.offload, folder)


def build_model(
    recipe: Recipe, checkpoint: Path | None, axes: Axes, offload: Offload
) -> tuple[Decoder, Zero[Decoder], Places]:
    """The decoder with its weights, divided over the mesh: those of `checkpoint` when a run goes on, else as it begins.

    A rank among others never holds more than its part and one whole tensor. What ZeRO divides is fp32 whatever the
    model's dtype, which is what it is gathered in.

    Raises:
        CheckpointError: the directory cannot be read, or the config describes no model of ours.
        ConfigError: sequences longer than the model's context, or a model that cannot be divided so.
    """
    config, dtype, mesh = recipe.model, DTYPES[recipe.model.dtype], axes.mesh
    source = config.from_ if recipe.lora else checkpoint or _first(recipe)
    if recipe.lora:
        adapters.check(mesh)
    divided = mesh.size("data") * mesh.size("sp") > 1
    if not mesh.alone:
        held = torch.float32 if divided else dtype
        decoder = axes.divide(weights.spec_from(hf_config(recipe)), device="meta", dtype=held)
    elif source is not None:
        memory = offload.place_weights if offload.keeps_weights else None
        wanted = None if recipe.heads in ("language", "draft") else hf_config(recipe)
        decoder = weights.load(source, dtype=dtype, sparse=config.sparse_attention, memory=memory, wanted=wanted)
    else:
        device = "meta" if offload.keeps_weights else "cpu"
        decoder = Decoder(weights.spec_from(hf_config(recipe)), dtype=dtype, device=device)
        if offload.keeps_weights:
            offload.place_weights(decoder)
        init_weights(decoder, recipe.run.seed, offload.let_go)
    if recipe.lora and mesh.alone:
        adapters.put(decoder, recipe.lora, recipe.run.seed, checkpoint)
    elif recipe.lora:
        adapt(decoder, recipe.lora)
    if recipe.data.seq_len > decoder.max_len:
        raise ConfigError(
            f"data.seq_len is {recipe.data.seq_len}, the model's context {decoder.max_len}: shorten the one or "
            "raise max_position_embeddings"
        )
    keeper = None if config.activations == "device" else kept.keeper(config.activations, recipe.run.output)
    recompute_layers(decoder, config.recompute, config.recompute_layers, keeper)
    stages = axes.pipeline.stages if axes.pipeline else ()
    narrow = dtype if divided and dtype != torch.float32 else None
    zero = Zero(decoder, mesh, narrow, stages, recipe.parallel, overlap=recipe.offload.gradients == "none")
    places = Places(decoder, axes)
    if not mesh.alone:
        fill(decoder, stages or [decoder], mesh.device, _values(recipe, decoder, checkpoint), places)
    return decoder, zero, places


def _first(recipe: Recipe) -> Path | None:
    """Where the first weights are, if they are not drawn from the seed."""
    return recipe.model.from_ if recipe.draft_head is None else None


def _values(recipe: Recipe, decoder: Decoder, checkpoint: Path | None) -> Value:
    """Where a rank's part of each parameter comes from."""
    if checkpoint and not recipe.lora:
        return saved(checkpoint, decoder)
    first: WholeParameters | FirstWeights
    if source := _first(recipe):
        first = WholeParameters(source, wanted=hf_config(recipe))
    else:
        first = FirstWeights(Decoder(weights.spec_from(hf_config(recipe)), device="meta"), recipe.run.seed)

    def base(name: str, place: Held) -> Tensor:
        return place.take(first[name])

    return adapters.values(decoder, base, recipe.run.seed, checkpoint) if recipe.lora else base


def build_optimizer(
    decoder: Decoder, recipe: Recipe, axes: Axes | None = None, offload: Offload | None = None
) -> Optimizer:
    """The recipe's rule over this rank's part of the decoder, which `axes` divided and Zero, if it does, has sliced."""
    axes = axes or Axes()
    if axes.experts and recipe.optimizer.name == "lamb":
        raise ConfigError(
            "optimizer.name is lamb, whose norms are of whole tensors, and parallel.ep keeps experts apart: "
            "set ep = 1, or take another optimizer"
        )
    named = dict(decoder.named_parameters())
    whole = Decoder(axes.tensor.whole, device="meta") if axes.tensor else decoder
    peers = peers_of(named, axes.tensor)
    return Optimizer(
        named.items(),
        recipe.optimizer,
        matrices=matrices(whole) | adapter_matrices(decoder),
        peers=peers,
        norm=axes.norm,
        offload=offload,
    )


def build_scaler(recipe: Recipe) -> LossScaler:
    """The loss scale of an fp16 run; of the others it is 1."""
    return LossScaler(recipe.fp16 if recipe.model.dtype == "fp16" else None)


def check_vocabulary(spec: ModelSpec, words: RecipeWords) -> None:
    """Raises ConfigError when the tokenizer has ids that the model's embedding has not."""
    have, need = spec.vocab, words.tokenizer.vocab_size
    if need > have:
        raise ConfigError(f"the tokenizer has {need} ids, the model {have}: raise vocab_size to at least {need}")


def hf_config(recipe: Recipe) -> dict[str, Any]:
    """The config.json that this run's checkpoints carry."""
    config, sparse = recipe.model.config, recipe.model.sparse_attention
    if config is None:
        assert recipe.model.from_ is not None
        config = weights.read_config(recipe.model.from_)
        if recipe.draft_head is not None:
            return config_for(weights.spec_from(config), digest(recipe.model.from_), recipe.draft_head.width)
    if recipe.heads == "critic":
        config = as_critic(config)
    elif recipe.heads == "reward":
        config = as_reward(config)
    return config if sparse is None else config | {weights.SPARSE: sparse}


def model_files(recipe: Recipe) -> ModelFiles:
    """The run's model as Hugging Face lays it out, tokenizer included."""
    return ModelFiles(hf_config(recipe), recipe.model.tokenizer_dir)


def run_files(recipe: Recipe, decoder: Decoder) -> Files:
    """What the run's checkpoints hold of the model: all of it, or its adapters as PEFT lays them out."""
    if recipe.lora is None:
        return model_files(recipe)
    return AdapterFiles(decoder, str(recipe.model.from_ or ""), recipe.model.tokenizer_dir)
