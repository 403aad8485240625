"""Which weights of a decoder may be quantized, and the decoder with empty panels in their places.

Projections, experts and the head are; so is a tied embedding, as a table of int8 rows, and a head beside int4 layers
is int8 too. Routers, gates, norms, biases, positions, score heads and an embedding that is not the head stay float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..core import CheckpointError, ConfigError
from ..quant.blocks import together
from ..quant.compressed import write_config
from ..quant.disk import stored_weights
from ..quant.format import SCALES, Format, named
from ..quant.linear import QuantLinear
from ..quant.stored import Find, Stored
from .decoder import Decoder
from .layout import Layouts
from .shards import Shard
from .tensors import Weight

PROJECTIONS = ("qkv", "out", "gate_up", "up", "down")
KEY = "quantization_config"

Formats = Mapping[str, Format]


def sites(decoder: Decoder) -> dict[str, Weight | QuantLinear]:
    """The places in a decoder whose weights may be quantized, by name ("layers.3.experts.down"), in order of use."""
    table = "embed" if decoder.spec.tied else "head"  # which a reward model does not have
    found: dict[str, Weight | QuantLinear] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Weight | QuantLinear):
            parent, _, last = name.rpartition(".")
            mine = name == table or (name == "embed" and isinstance(module, QuantLinear))
            if mine or (parent.startswith("layers.") and last in PROJECTIONS):
                found[name] = module
    return found


def table_format(layers: Format) -> Format:
    """The format of the head, and of an embedding that is the head: one int8 scale a row."""
    return replace(layers, bits=8, group=0, symmetric=True, numbers="int", tensor=False, offset=False, ordered=False)


def formats(decoder: Decoder, name: str, *, table: bool = True) -> dict[str, Format]:
    """The format of each place when a model is quantized to `name`; without `table`, embedding and head stay float.

    Raises:
        ConfigError: no such format; the message has the nearest.
    """
    layers = named(name)
    chosen = {place: layers if place.startswith("layers.") else table_format(layers) for place in sites(decoder)}
    return {place: format for place, format in chosen.items() if table or place.startswith("layers.")}


def check_config(told: Mapping[str, Any] | None) -> None:
    """Refuse a `quantization_config` that Twofold does not build. Raises CheckpointError naming the setting."""
    if told:
        stored_weights(told, ())


def stored_formats(decoder: Decoder, config: Mapping[str, Any], shards: list[Shard]) -> dict[str, Stored]:
    """How each quantized place of a checkpoint lies on disk; empty for a float checkpoint.

    Raises:
        CheckpointError: a quantization_config that Twofold does not build, or parts of one weight in several formats.
    """
    told = config.get(KEY)
    if not told:
        return {}
    places = sites(decoder)
    modules = {
        slot.name.removesuffix(".weight"): slot.inner.removesuffix(".weight")
        for slot in Layouts(decoder).slots.values()
        if slot.inner.removesuffix(".weight") in places and slot.inner != "embed.weight"
    }
    where = {name: shard for shard in shards for name in shard.entries}

    def find(name: str) -> Tensor | None:
        return where[name].tensor(name) if name in where else None

    by_module, embedding = stored_weights(told, modules, find)
    found: dict[str, Stored] = {}
    for place in dict.fromkeys(modules.values()):
        first, *others = (module for module, its in modules.items() if its == place)
        ways = {
            f"{module}.weight": _with_scale(by_module[module], f"{module}.weight", find)
            for module in (first, *others)
            if module in by_module
        }
        alike = set(ways.values()) if told.get("quant_method") != "gguf" else set()
        for module in others:
            if len(alike) > 1 or (f"{module}.weight" in ways) != (f"{first}.weight" in ways):
                raise CheckpointError(
                    f"'{first}' and '{module}' are multiplied as one and must be quantized alike; they are not"
                )
        if ways:
            found[place] = together(ways)
            if ".experts." in place and found[place].format.ordered:
                raise CheckpointError(f"{place}: experts whose inputs are in an order of their own are not read")
    if embedding is not None:
        found["embed"] = _with_scale(embedding, Layouts(decoder).embed, find)
    return found


S = TypeVar("S", bound=Stored)


def _with_scale(stored: S, name: str, find: Find) -> S:
    """The same with the dtype that its scales have; one that they cannot have is refused when the tensor is claimed."""
    parts = stored.parts(name, 1024, 1024)
    scale = find(parts["scale"].name) if "scale" in parts else None
    if scale is None or scale.dtype not in SCALES.values():
        return stored
    kept: Any = next(word for word, dtype in SCALES.items() if dtype == scale.dtype)
    changed: Any = stored
    return cast(S, replace(changed, format=replace(stored.format, scale=kept)))


def prepare(decoder: Decoder, formats: Formats) -> None:
    """Put empty panels in the places of `formats`, on the decoder's device; biases stay where they are."""
    for place, format in formats.items():
        weight = decoder.get_submodule(place)
        if isinstance(weight, Weight):
            shape = tuple(weight.weight.shape)
            device = weight.weight.device
            order = torch.empty(shape[-1], dtype=torch.int32, device=device) if format.ordered else None
            swap(decoder, place, QuantLinear(format.empty(*shape, device=device), format, weight.bias, order))


def swap(decoder: Decoder, place: str, module: nn.Module) -> None:
    """Another module under the same name."""
    parent, _, last = place.rpartition(".")
    setattr(decoder.get_submodule(parent), last, module)


def formats_of(decoder: Decoder) -> dict[str, Format]:
    """The formats that a decoder has now; empty when all of it is float."""
    return {place: module.format for place, module in sites(decoder).items() if isinstance(module, QuantLinear)}


def quantize_weights(decoder: Decoder, formats: Formats) -> None:
    """Round a float decoder's weights to nearest, in place, one at a time."""
    for place, format in formats.items():
        weight = decoder.get_submodule(place)
        if not isinstance(weight, Weight):
            raise ConfigError(f"{place} is quantized already, or has no weight")
        with torch.no_grad():
            empty = format.empty(*weight.weight.shape, device=weight.weight.device)
            rounded = QuantLinear(empty, format, weight.bias)
            rounded.round(weight.weight)
            swap(decoder, place, rounded)


def config_of(decoder: Decoder) -> dict[str, Any] | None:
    """`quantization_config` for a decoder; None when all of it is float."""
    now = formats_of(decoder)
    if not now:
        return None
    modules: dict[str, Format] = {}
    ignore: set[str] = set(Layouts(decoder).tied_heads)
    for slot in Layouts(decoder).weights():
        place = slot.inner.removesuffix(".weight")
        name = slot.name.removesuffix(".weight")
        if place in now and place != "embed":
            modules[name] = now[place]
        elif isinstance(decoder.get_submodule(place), Weight) and place not in ("embed", "positions"):
            ignore.add(name)
    return write_config(modules, {name.removesuffix(".weight") for name in ignore}, now.get("embed"))
