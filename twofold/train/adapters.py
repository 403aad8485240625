"""What a run with `[lora]` does otherwise: adapters on a base that stays, and both of them as one at the end.

    base        model.from, or the first weights of the seed      read anew whenever the run starts
    adapters    drawn by seed and name, or a checkpoint's         what checkpoints hold
    the end     run.output/adapter as PEFT has it, run.output/model merged; no model where the base is quantized

The optimizer sees what asks for gradients, so ZeRO, offload and the rules know nothing of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..core import ConfigError
from ..models.decoder import Decoder
from ..models.draft_head import digest
from ..models.lora import FirstPairs, adapt, loras, pair_parameters, trained_parameters
from ..models.lora_config import LoraConfig
from ..models.quantized import KEY
from ..models.spec import ModelSpec
from ..models.weights import read_config
from ..parallel import Mesh
from .config import Recipe
from .pieces import Held, Piece
from .places import Places
from .state import Value, saved, weight_pieces


def check(mesh: Mesh) -> None:
    """Raises ConfigError when the ranks divide the model in a way that adapters are not divided in."""
    sizes = {"tp": mesh.size("tp"), "pp": mesh.size("pp"), "ep": mesh.size("ep")}
    for axis, size in sizes.items():
        if size > 1:
            raise ConfigError(
                f"[lora] and parallel.{axis} = {size}: adapters are divided by ZeRO and along sequences (sp) only; set "
                f"parallel.{axis} = 1, and parallel.zero = 3 where the base does not fit one rank"
            )


def fingerprint(recipe: Recipe) -> str:
    """What tells a base from another, where the run trains beside one.

    The base is not in the run's checkpoints, so a run that goes on must find the same one.
    """
    base = recipe.model.from_
    if base is None or (recipe.lora is None and recipe.draft_head is None):
        return ""
    return digest(base)


def quantized(recipe: Recipe) -> bool:
    """Whether the base's weights are codes, which adapters are trained beside (QLoRA) but cannot be added to."""
    base = recipe.model.from_
    return recipe.lora is not None and base is not None and bool(read_config(base).get(KEY))


def result(recipe: Recipe) -> Path:
    """The directory that is there when a run has finished."""
    return recipe.run.output / ("adapter" if quantized(recipe) else "model")


def said(recipe: Recipe) -> str:
    """Where the finished model is."""
    if recipe.draft_head is not None:
        return f"the head for {recipe.model.from_} is {result(recipe)}"
    if not quantized(recipe):
        return f"the model is {result(recipe)}"
    return f"the model is {recipe.model.from_} (quantized, as it was) with the adapter {result(recipe)}"


def share(spec: ModelSpec, config: LoraConfig) -> float:
    """The numbers of the adapters for each number of the model."""
    decoder = Decoder(spec, device="meta")
    adapt(decoder, config)
    mine = sum(parameter.numel() for parameter in pair_parameters(decoder).values())
    return mine / (sum(parameter.numel() for parameter in decoder.parameters()) - mine)


def put(decoder: Decoder, config: LoraConfig, seed: int, checkpoint: Path | None) -> None:
    """Adapters beside the weights of one process's decoder, with the values that the run goes on from."""
    adapt(decoder, config, seed)
    if checkpoint is None:
        return
    value = saved(checkpoint, decoder)
    with torch.no_grad():
        for name, parameter in trained_parameters(decoder).items():
            parameter.copy_(value(name, Held.all(parameter.shape)))


def values(decoder: Decoder, base: Value, seed: int, checkpoint: Path | None) -> Value:
    """Where a rank's part of each parameter of an adapted decoder comes from; `base` knows those that are frozen."""
    if checkpoint:
        mine, own = saved(checkpoint, decoder), trained_parameters(decoder)
        return lambda name, place: mine(name, place) if name in own else base(name, place)
    first = FirstPairs(decoder, seed)
    return lambda name, place: place.take(first[name]) if name in first else base(name, place)


def merged_pieces(decoder: Decoder, places: Places, dtype: torch.dtype, written: torch.dtype) -> dict[str, Piece]:
    """The whole model's weights, adapters added in fp32 and rounded once to `written`. A collective.

    Each rank adds to its own part; of one weight at a time it has all of what is added.
    """
    deltas = {f"{place}.weight": lora for place, lora in loras(decoder).items()}
    pieces = weight_pieces(decoder, places, dtype, written, every=True)
    for name in pair_parameters(decoder):
        del pieces[name]

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(dtype)

    for name, lora in deltas.items():
        if name not in pieces:
            raise ConfigError(f"{name} is quantized: merge the adapters into the float checkpoint it was made from")
        mine = pieces[name]
        added = mine.tensor.float() + places[name].take(lora.delta(whole)).to(mine.tensor.device)
        pieces[name] = Piece(mine.held, added.to(written), written)
    return pieces
