"""How each tensor of a checkpoint lies inside the decoder's parameters, both ways.

    model.layers.3.self_attn.q_proj.weight [64, 48]   <->   layers.3.qkv.weight[0:64]
    transformer.h.3.attn.c_attn.weight    [48, 144]   <->   layers.3.qkv.weight, transposed
    ....mlp.experts.5.w1.weight           [52, 48]    <->   layers.3.experts.gate_up.weight[5, 0:52]

A Slot is one such line. The map is strict: each slot must be filled once, and nothing else may be in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from .decoder import Decoder
from .spec import Attention, Layout, ModelSpec

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


class Layouts:
    """Every slot of a decoder, by the checkpoint's name, with the other names that are understood when reading."""

    def __init__(self, decoder: Decoder) -> None:
        self.names = decoder.spec.names
        self.slots: dict[str, Slot] = {}
        self._also: dict[str, Slot] = {}
        spec = decoder.spec
        for inner, parameter in decoder.named_parameters():
            shape = tuple(parameter.shape)
            for slot in _slots(spec, self.names.table, inner, shape):
                self.slots[slot.name] = slot
            for slot in _slots(spec, self.names.also, inner, shape):
                self._also[slot.name] = slot
        heads = (names["head"] for names in (self.names.table, self.names.also) if "head" in names)
        self.tied_heads = {f"{head}.weight" for head in heads} if spec.head.tied else set()
        self.embed = next(name for name, slot in self.slots.items() if slot.inner == "embed.weight")

    def find(self, name: str) -> Slot | None:
        """The slot that a checkpoint's tensor fills; None when it carries no weight (old buffers).

        Raises:
            CheckpointError: nothing in this model has that name.
        """
        for candidate in (name, self.names.prefix + name):
            slot = self.slots.get(candidate) or self._also.get(candidate)
            if slot is not None:
                return slot
            if candidate in self.tied_heads:
                return self.slots[self.embed]
        if name.endswith(self.names.ignore):
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


class Filler:
    """Puts tensors into a decoder one at a time and knows what is still missing.

    A tensor under another accepted name (all experts as one) fills the slots whose place it covers.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.layouts = Layouts(decoder)
        self._parameters = dict(decoder.named_parameters())
        self._filled: set[str] = set()
        self._by_inner: dict[str, list[str]] = {}
        for slot in self.layouts.slots.values():
            self._by_inner.setdefault(slot.inner, []).append(slot.name)

    def claim(self, name: str, shape: tuple[int, ...]) -> Slot | None:
        """Check a tensor's name and shape, and mark its place as filled; None for one that carries no weight.

        Raises:
            CheckpointError: a left-over or repeated tensor, or one of another shape.
        """
        slot = self.layouts.find(name)
        if slot is None:
            return None
        if shape != slot.shape:
            raise CheckpointError(f"tensor '{name}' has shape {list(shape)}; config.json asks for {list(slot.shape)}")
        if self.is_tied_head(name):
            return slot
        covered = [slot.name] if slot.name in self.layouts.slots else self._by_inner[slot.inner]
        if not self._filled.isdisjoint(covered):
            raise CheckpointError(f"tensor '{name}' is there twice, or under two names")
        self._filled.update(covered)
        return slot

    def is_tied_head(self, name: str) -> bool:
        """Whether this is the head of a model whose head is its embedding."""
        return name in self.layouts.tied_heads

    def put(self, name: str, slot: Slot, tensor: Tensor) -> None:
        """Copy a claimed tensor into place; a tied head is only compared.

        Raises:
            CheckpointError: a tied head that differs from the embedding, or a dtype that holds no plain weights.
        """
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"tensor '{name}' is {tensor.dtype}; plain float weights are needed, not quantized ones"
            )
        parameter = self._parameters[slot.inner]
        if not self.is_tied_head(name):
            slot.write(parameter, tensor)
        elif not torch.equal(tensor.to(parameter.device, parameter.dtype), parameter):
            raise CheckpointError(
                f"'{name}' differs from the embedding although config.json ties them; set tie_word_embeddings to false"
            )

    def finish(self) -> None:
        """Refuse a decoder with holes.

        Raises:
            CheckpointError: naming the missing tensors.
        """
        missing = [name for name in self.layouts.slots if name not in self._filled]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"the checkpoint lacks {', '.join(repr(name) for name in missing[:3])}{more}")
