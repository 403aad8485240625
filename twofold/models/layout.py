"""How each tensor of a checkpoint lies inside the decoder's parameters, both ways.

    model.layers.3.self_attn.q_proj.weight [64, 48]   <->   layers.3.qkv.weight[0:64]
    transformer.h.3.attn.c_attn.weight    [48, 144]   <->   layers.3.qkv.weight, transposed
    ....mlp.experts.5.w1.weight           [52, 48]    <->   layers.3.experts.gate_up.weight[5, 0:52]

A Slot is one such line. The map is strict: each slot must be filled once, and nothing else may be in the checkpoint.
Where the decoder holds a quantized weight, its slots are pieces: codes, scales and zeros, as their writer has them.
Float weights are understood there too when reading, and rounded when the last of them is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..quant.blocks import Mixed
from ..quant.codes import Quantized
from ..quant.compressed import Compressed, is_packed, written
from ..quant.disk import CACHE_SCALES
from ..quant.linear import QuantLinear
from ..quant.stored import Stored
from .decoder import Choice, Decoder
from .scoring import TENSOR
from .spec import Attention, Layout, ModelSpec
from .tensors import Weight

Index = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One tensor of the checkpoint: `name` and `shape` there, its place `at` in the decoder's parameter `inner`."""

    name: str
    shape: tuple[int, ...]
    inner: str
    at: Index = ()
    layout: Layout = "plain"
    mixer: Attention | None = None

    def write(self, parameter: Tensor, source: Tensor) -> None:
        """Copy a checkpoint's tensor into its place, converting to the parameter's dtype and device."""
        place = parameter[self.at]
        for part, piece in zip(self._parts(place), self._pieces(source), strict=True):
            part.copy_(piece)

    def read(self, parameter: Tensor) -> Tensor:
        """The tensor as the checkpoint has it: a view where its rows lie together, else a copy."""
        place = parameter[self.at]
        if self.layout == "plain" or (self.layout == "transposed" and place.dim() == 1):
            return place
        if self.layout == "transposed":
            return place.t()
        out = place.new_empty(self.shape)
        for part, piece in zip(self._parts(place), self._pieces(out), strict=True):
            piece.copy_(part)
        return out

    def _parts(self, place: Tensor) -> list[Tensor]:
        """Our side: [rows] as it is, or q, k, v as [heads, d, ...] each."""
        if self.layout in ("plain", "transposed") or self.mixer is None:
            return [place]
        mixer, rest = self.mixer, place.shape[1:]
        q, k, v = place.split((mixer.q_width, mixer.kv_width, mixer.kv_width))
        groups = (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)
        return [q.view(*groups, *rest), *(x.view(mixer.kv_heads, mixer.head_dim, *rest) for x in (k, v))]

    def _pieces(self, stored: Tensor) -> list[Tensor]:
        """The checkpoint's side, as views that match `_parts`."""
        if self.layout == "transposed" and stored.dim() == 2:
            return [stored.t()]
        if self.layout in ("plain", "transposed") or self.mixer is None:
            return [stored]
        # headwise is grouped with one query head a group: [K, queries..., key, value]
        mixer = self.mixer
        each = mixer.heads // mixer.kv_heads
        packed = stored.view(mixer.kv_heads, each + 2, mixer.head_dim, *stored.shape[1:])
        return [packed[:, :each], packed[:, each], packed[:, each + 1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece(Slot):
    """One part of a quantized weight on disk. `whole` is the slot that the weight would have as floats, [n, k]."""

    whole: Slot
    part: str
    stored: Stored
    dtypes: tuple[torch.dtype, ...]
    needed: bool = True

    def take(self, quantized: Quantized) -> Tensor:
        """The tensor as the checkpoint that we write has it."""
        assert isinstance(self.stored, Compressed)
        n = self.whole.shape[0]

        def own(numbers: Tensor) -> Tensor:
            return replace(self.whole, shape=(n, numbers.shape[-1])).read(numbers)

        zero = None if quantized.zero is None else own(quantized.zero)
        order = quantized.order if quantized.order is None or not self.at else quantized.order[self.at[:-1]]
        mine = Quantized(own(quantized.codes), own(quantized.scale), zero, quantized.format, order)
        return self.stored.encode(self.part, mine, n)


class Layouts:
    """Every slot of a decoder, by the checkpoint's name, with the other names that are understood when reading.

    `stored` says how quantized weights lie on disk, where a checkpoint does; else it is as we write them.
    """

    def __init__(self, decoder: Decoder, stored: Mapping[str, Stored] | None = None) -> None:
        self.names = decoder.spec.names
        self.slots: dict[str, Slot] = {}
        self._whole: dict[str, Slot] = {}
        self._also: dict[str, Slot] = {}
        spec = decoder.spec
        for inner, parameter in held(decoder).items():
            shape = tuple(parameter.shape)
            for slot in _slots(spec, self.names.table, inner, shape):
                self.slots[slot.name] = slot
            for slot in _slots(spec, self.names.also, inner, shape):
                self._also[slot.name] = slot
        heads = (names["head"] for names in (self.names.table, self.names.also) if "head" in names)
        self.tied_heads = {f"{head}.weight" for head in heads} if spec.tied else set()
        self._deaf = {TENSOR} if spec.score is None else set()
        self._stored = bool(stored)
        self._add_quantized(decoder, stored or {})
        self.embed = next((name for name, slot in self._floats().items() if slot.inner == "embed.weight"), "")

    def _add_quantized(self, decoder: Decoder, stored: Mapping[str, Stored]) -> None:
        held = quantized_modules(decoder)
        usual = is_packed(module.format for module in held.values())
        for place, module in held.items():
            how = stored.get(place) or written(module.format, usual or place == "embed")
            inner = f"{place}.weight"
            for slot in _slots(decoder.spec, self.names.also, inner, module.shape):
                self._also[slot.name] = slot
            for slot in _slots(decoder.spec, self.names.table, inner, module.shape):
                self._whole[slot.name] = slot
                mine = how.of(slot.name) if isinstance(how, Mixed) else how
                whole = slot if slot.layout != "transposed" else replace(slot, layout="plain", shape=slot.shape[::-1])
                for key, part in mine.parts(slot.name, *whole.shape).items():
                    if part.needed or (stored and part.name not in self.slots):
                        self.slots[part.name] = Piece(
                            name=part.name,
                            shape=part.shape,
                            inner=inner,
                            at=slot.at,
                            whole=whole,
                            part=key,
                            stored=mine,
                            dtypes=part.dtypes,
                            needed=part.needed,
                        )

    def _floats(self) -> dict[str, Slot]:
        return {name: slot for name, slot in self.slots.items() if not isinstance(slot, Piece)} | self._whole

    def weights(self) -> list[Slot]:
        """The slots of every matrix, as if all were floats."""
        return [slot for slot in self._floats().values() if slot.inner.endswith(".weight") and len(slot.shape) > 1]

    def covered(self, slot: Slot) -> list[str]:
        """The names of the slots that are filled with this one: its own, or those whose place it covers."""
        if self.slots.get(slot.name) == slot:
            return [slot.name]
        there = {
            name: other
            for name, other in self.slots.items()
            if other.inner == slot.inner and (not isinstance(other, Piece) or other.needed)
        }
        alike = [name for name, other in there.items() if other.at == slot.at]
        if self._whole.get(slot.name) == slot:
            return [name for name in alike if isinstance(there[name], Piece)]
        return alike or list(there)

    def find(self, name: str, codes: bool = False) -> Slot | None:
        """The slot that a checkpoint's tensor fills; None when it carries no weight of this model: old buffers, and the
        value head of a critic that is read as the causal model that it is too.

        A quantized weight and a float one may have the same name; `codes` says that the tensor's numbers are whole.

        Raises:
            CheckpointError: nothing in this model has that name.
        """
        for candidate in (name, self.names.prefix + name):
            slot = self.slots.get(candidate)
            if slot is None or (isinstance(slot, Piece) and slot.part == "codes" and not codes):
                slot = self._whole.get(candidate) or self._also.get(candidate) or slot
            if slot is not None:
                return slot
            if candidate in self.tied_heads:
                return self._floats()[self.embed]
        if name.endswith(self.names.ignore) or name in self._deaf or (self._stored and name.endswith(CACHE_SCALES)):
            return None
        raise CheckpointError(
            f"left-over tensor '{name}': this model has no place for it; does config.json belong to these weights?"
        )


def _slots(spec: ModelSpec, table: Mapping[str, str], inner: str, shape: tuple[int, ...]) -> Iterator[Slot]:
    """The slots that make up one parameter, as far as `table` names it."""
    stem, _, suffix = inner.rpartition(".")
    number = re.match(r"layers\.(\d+)\.", inner)
    layer = int(number[1]) if number else -1
    key = re.sub(r"^layers\.\d+\.", "layers.{i}.", stem)
    mixer = spec.layers[layer].mixer if layer >= 0 else None

    def name(pattern: str, **numbers: int) -> str:
        return pattern.format(i=layer, **numbers) + "." + suffix

    if f"{key}.{suffix}" in table:
        yield Slot(name=table[f"{key}.{suffix}"].format(i=layer), shape=shape, inner=inner)
    elif key in table and "{h}" in table[key]:
        for head in range(shape[0]):
            yield Slot(name=name(table[key], h=head), shape=shape[1:], inner=inner, at=(head,))
    elif key in table:
        layout = spec.names.layouts.get(key, "plain")
        stored = shape[::-1] if layout == "transposed" else shape
        yield Slot(name=name(table[key]), shape=stored, inner=inner, layout=layout, mixer=mixer)
    elif ".experts." in key:
        part = key.rpartition(".")[2]
        for expert in range(shape[0]):
            for piece, rows in _pieces(spec, layer, part, shape[1]):
                pattern = table.get("layers.{i}.experts.{e}." + piece)
                if pattern is not None:
                    size = (rows.stop - rows.start, *shape[2:])
                    yield Slot(name=name(pattern, e=expert), shape=size, inner=inner, at=(expert, rows))
    else:
        parent, _, part = key.rpartition(".")
        for piece, rows in _pieces(spec, layer, part, shape[0]):
            pattern = table.get(f"{parent}.{piece}")
            if pattern is not None:
                yield Slot(name=name(pattern), shape=(rows.stop - rows.start, *shape[1:]), inner=inner, at=(rows,))


def _pieces(spec: ModelSpec, layer: int, part: str, rows: int) -> list[tuple[str, slice]]:
    """The parts of a fused parameter and their rows; a parameter that is not fused is its own only part."""
    if part == "qkv":
        mixer = spec.layers[layer].mixer
        q, k = mixer.q_width, mixer.q_width + mixer.kv_width
        return [("q", slice(0, q)), ("k", slice(q, k)), ("v", slice(k, rows))]
    if part == "gate_up":
        return [("gate", slice(0, rows // 2)), ("up", slice(rows // 2, rows))]
    return [(part, slice(0, rows))]


def held(decoder: Decoder) -> dict[str, Tensor]:
    """What a decoder holds as plain numbers, by name: its parameters, and the biases of its choices of experts."""
    biases = {f"{name}.bias": m.bias for name, m in decoder.named_modules() if isinstance(m, Choice)}
    return {**dict(decoder.named_parameters()), **biases}


def matrices(decoder: Decoder) -> dict[str, tuple[Index, ...]]:
    """The matrices of the layers' weights, by the parameter's name: q, k, v, gate and up alone, each expert alone.

    What is no matrix (norms, and a gate of one row) and what is in no layer (embeddings, the head) is left out.
    """
    found: dict[str, tuple[Index, ...]] = {}
    for name, module in decoder.named_modules():
        if not (isinstance(module, Weight) and name.startswith("layers.")) or min(module.weight.shape[-2:]) < 2:
            continue
        layer, part, shape = int(name.split(".")[1]), name.rpartition(".")[2], module.weight.shape
        pieces = [rows for _, rows in _pieces(decoder.spec, layer, part, shape[-2])]
        stack = [(expert,) for expert in range(shape[0])] if len(shape) == 3 else [()]
        found[f"{name}.weight"] = tuple((*expert, rows) for expert in stack for rows in pieces)
    return found


def quantized_modules(decoder: Decoder) -> dict[str, QuantLinear]:
    """The decoder's quantized weights, by the name of their place."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, QuantLinear)}
