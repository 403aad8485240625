"""A decoder as calibration sees it: blocks, the weights in them in the order of use, and where scales can move.

    norm ▸ qkv                  any norm with weights in front of a projection (Pre, Parallel, Sandwich)
    v's rows ▸ out              attention is linear in v: one scale a key-value head's channel
    up's rows ▸ down            the gated product is linear in up; so is a plain one behind relu

Shapes: T tokens, D hidden, F feed-forward width, K inputs, C channels of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError
from ..data.pack import Batch
from ..kernels.activation import gated
from ..kernels.linear import linear
from ..quant.calibrate import Block, Site, Told, calibrate, round_site
from ..quant.codes import Quantized
from ..quant.config import Recipe
from ..quant.format import Format
from ..quant.linear import QuantLinear
from ..quant.scaling import Fold
from .decoder import Decoder, Experts, Layer
from .packed import PackedContext
from .quantized import formats, sites, swap
from .spec import Gated, Mixture, Parallel, Plain, Pre, Sandwich
from .tensors import Normalise, Weight


def blocks(decoder: Decoder, chosen: Mapping[str, Format]) -> tuple[list[Block], list[Site]]:
    """The layers to calibrate, and the sites outside of them (the head, or the embedding that is the head)."""
    places = sites(decoder)
    made, outside = [], []
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        prefix = f"layers.{index}."
        mine = [name for name in places if name.startswith(prefix) and name in chosen]
        made.append(
            Block(
                module=layer,
                sites=[_site(decoder, name, chosen[name]) for name in mine],
                folds=partial(_folds, layer, prefix, chosen),
            )
        )
    outside = [_site(decoder, name, chosen[name]) for name in places if name in chosen and "layers." not in name]
    return made, outside


def quantize(decoder: Decoder, recipe: Recipe, batches: Sequence[Batch]) -> Iterator[Told]:
    """Quantize a float decoder in place, telling of each weight as it is done; `batches` are read layer by layer.

    Raises:
        ConfigError: text is needed and there is none, or the decoder is quantized already.
    """
    if recipe.method != "rtn" and not batches:
        raise ConfigError(f"{recipe.method} looks at what passes through each layer: give it text, or use rtn")
    layers, outside = blocks(decoder, formats(decoder, recipe.name, table=recipe.table))
    calls = [(batch.ids_T, PackedContext(batch.lengths, decoder.device)) for batch in batches]
    yield from calibrate(decoder, layers, calls, recipe)
    for site in outside:
        yield round_site(site)


def _site(decoder: Decoder, name: str, format: Format) -> Site:
    weight = decoder.get_submodule(name)
    if not isinstance(weight, Weight):
        raise ConfigError(f"{name} is quantized already: quantize a float checkpoint")
    bias = weight.bias

    def place(quantized: Quantized) -> None:
        swap(decoder, name, QuantLinear.of(quantized, bias))

    parent = decoder.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, Experts):
        inputs = partial(_to_gate_up if name.endswith("gate_up") else _to_down, parent)
        return Site(name=name, weight=weight.weight, format=format, listen=parent, place=place, inputs=inputs)
    return Site(name=name, weight=weight.weight, format=format, listen=weight, place=place)


# -------------------------------------------------------------------------------------------------- experts
def _routed(experts: Experts, args: tuple[Any, ...]) -> list[Tensor]:
    """The tokens of each expert."""
    x_TD, _, experts_TC = args
    return [x_TD[torch.where(experts_TC == expert)[0]] for expert in range(experts.spec.experts)]


def _to_gate_up(experts: Experts, args: tuple[Any, ...]) -> list[Tensor]:
    return _routed(experts, args)


def _to_down(experts: Experts, args: tuple[Any, ...]) -> list[Tensor]:
    """The inner numbers of each expert, through gate and up as they are now."""
    first: Any = experts.gate_up
    if isinstance(first, QuantLinear):
        format, held = first.format, first.quantized
        each = [
            partial(format.multiply, quantized=Quantized(codes, scale, zero, format))
            for codes, scale, zero in zip(
                held.codes, held.scale, [None] * len(held.codes) if held.zero is None else held.zero, strict=True
            )
        ]
    else:
        each = [partial(linear, w_NK=weight) for weight in first.weight]
    return [gated(go(x_TD), experts.spec.act) for go, x_TD in zip(each, _routed(experts, args), strict=True)]


# -------------------------------------------------------------------------------------------------- folds
def _folds(layer: Layer, prefix: str, chosen: Mapping[str, Format]) -> list[Fold]:
    """Where scales can move in one layer."""
    found: list[Fold] = []

    def add(listen: str, divide: Callable[[Tensor], Tensor], channel_K: Tensor, norm: bool, *readers: str) -> None:
        """A fold into the named weights; those without a format stay float."""
        weights = {name: layer.get_parameter(f"{name}.weight") for name in readers}
        rounded = [(weight, chosen[prefix + name]) for name, weight in weights.items() if prefix + name in chosen]
        others = [weight for name, weight in weights.items() if prefix + name not in chosen]
        if rounded and prefix + listen in chosen:
            found.append(
                Fold(
                    listen=prefix + listen,
                    divide=divide,
                    channel_K=channel_K,
                    readers=rounded,
                    others=others,
                    norm=norm,
                )
            )

    for norm, readers in _norm_readers(layer):
        if norm.weight is not None:
            every_K = torch.arange(norm.weight.shape[-1])
            add(readers[0], partial(_divide_norm, norm), every_K, True, *readers)
    mixer, ffn = layer.spec.mixer, layer.spec.ffn
    if mixer.clip_qkv is None:
        each = mixer.heads // mixer.kv_heads
        channels_KD = torch.arange(mixer.kv_width).view(mixer.kv_heads, 1, mixer.head_dim)
        channel_K = channels_KD.expand(mixer.kv_heads, each, mixer.head_dim).reshape(-1)
        add("out", partial(_divide_rows, layer.qkv, mixer.q_width + mixer.kv_width), channel_K, False, "out")
    match ffn:
        case Gated(width=width):
            add("down", partial(_divide_rows, layer.gate_up, width), torch.arange(width), False, "down")
        case Plain(width=width, act="relu"):
            add("down", partial(_divide_rows, layer.up, 0), torch.arange(width), False, "down")
        case Mixture(shared_width=shared) if shared:
            divide = partial(_divide_rows, layer.shared.gate_up, shared)
            add("shared.down", divide, torch.arange(shared), False, "shared.down")
    return found


def _norm_readers(layer: Layer) -> list[tuple[Normalise, Sequence[str]]]:
    """Norms whose outputs go into projections and nowhere else, the one to listen at first."""
    match layer.spec.ffn:
        case Gated():
            ffn = ["gate_up"]
        case Plain():
            ffn = ["up"]
        case Mixture(shared_width=shared, shared_gate=gate):
            beside = ["shared.gate_up", *(["shared_gate"] if gate else [])]
            ffn = ["experts.gate_up", "router", *(beside if shared else [])]
    match layer.spec.norms:
        case Pre() | Parallel(shared=False):
            return [(layer.norm1, ["qkv"]), (layer.norm2, ffn)]
        case Parallel():
            return [(layer.norm1, ["qkv", *ffn])]
        case Sandwich():
            return [(layer.norm1, ["qkv"]), (layer.norm3, ffn)]
    return []


def _divide_norm(norm: Normalise, s_C: Tensor) -> Tensor:
    """Divide a norm's weight, and say by what exactly, its own rounding counted; channels of weight 0 stay."""
    assert norm.weight is not None
    offset = 1.0 if norm.spec.offset else 0.0
    before_C = norm.weight.float() + offset
    after = (before_C / s_C - offset).to(norm.weight.dtype)
    after_C = after.float() + offset
    moved_C = (before_C != 0) & (after_C != 0)
    exact_C = torch.where(moved_C, before_C / torch.where(moved_C, after_C, 1.0), 1.0)
    norm.weight.copy_(torch.where(moved_C, after, norm.weight))
    if norm.bias is not None:
        norm.bias.copy_(norm.bias.float() / exact_C)
    return exact_C


def _divide_rows(source: Weight, first: int, s_C: Tensor) -> Tensor:
    """Divide the rows of a weight from `first` on, and their biases."""
    rows = slice(first, first + len(s_C))
    source.weight[rows] = (source.weight[rows].float() / s_C[:, None]).to(source.weight.dtype)
    if source.bias is not None:
        source.bias[rows] = (source.bias[rows].float() / s_C).to(source.bias.dtype)
    return s_C
