"""Filler: puts a checkpoint's tensors into a decoder one at a time, and knows what is still missing.

    float tensor ----------------------> its place in a parameter
    float tensor of a quantized weight -> staged until the weight is whole -> rounded -> panels
    codes, scales, zeros --------------> staged until the weight is whole -----------> panels

A tensor under another accepted name (all experts as one) fills the slots whose place it covers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..quant.codes import Quantized
from ..quant.compressed import Stored
from ..quant.linear import QuantLinear
from .decoder import Decoder
from .layout import Layouts, Piece, Slot, held, quantized_modules
from .scoring import SAME, Exchange


class Filler:
    """`stored` says how quantized weights lie in the checkpoint, where it says so itself; `exchange` what of heads may
    be spare or lacking.
    """

    def __init__(self, decoder: Decoder, stored: Mapping[str, Stored] | None = None, exchange: Exchange = SAME) -> None:
        self.layouts = Layouts(decoder, stored)
        self._strict, self._exchange = bool(stored), exchange
        self._parameters = held(decoder)
        self._filled: set[str] = set()
        counts: dict[str, int] = {}
        for slot in self.layouts.slots.values():
            counts[slot.inner] = counts.get(slot.inner, 0) + 1
        self._staged = {
            f"{place}.weight": Staged(module, counts[f"{place}.weight"])
            for place, module in quantized_modules(decoder).items()
        }

    def claim(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Slot | None:
        """Check a tensor's name, shape and kind, and mark its place as filled; None for one that carries no weight.

        Raises:
            CheckpointError: a left-over or repeated tensor, or one of another shape or dtype.
        """
        spare = name in self._exchange.spare
        slot = None if spare else self.layouts.find(name, codes=not dtype.is_floating_point)
        if slot is None:
            return None
        if shape != slot.shape:
            raise CheckpointError(f"tensor '{name}' has shape {list(shape)}; config.json asks for {list(slot.shape)}")
        self._check_kind(name, slot, dtype)
        if self.is_tied_head(name):
            return slot
        covered = self.layouts.covered(slot)
        if not self._filled.isdisjoint(covered):
            raise CheckpointError(f"tensor '{name}' is there twice, or under two names")
        self._filled.update(covered)
        return slot

    def _check_kind(self, name: str, slot: Slot, dtype: torch.dtype) -> None:
        if isinstance(slot, Piece):
            wanted = slot.stored.dtype(slot.part)
            if dtype != wanted and not (slot.part == "shape" and dtype == torch.int32):
                raise CheckpointError(f"tensor '{name}' is {dtype}; config.json asks for {wanted}")
        elif not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(
                f"tensor '{name}' is {dtype}; plain float weights are needed where config.json names no quantization"
            )
        elif self._strict and slot.inner in self._staged and not self.is_tied_head(name):
            raise CheckpointError(f"tensor '{name}' is {dtype}, but config.json says that it is quantized")

    def is_tied_head(self, name: str) -> bool:
        """Whether this is the head of a model whose head is its embedding."""
        return name in self.layouts.tied_heads

    def place(self, name: str, slot: Slot, dtype: torch.dtype) -> Tensor | None:
        """Where the bytes of a claimed tensor of this dtype belong as they are in the file.

        None when they must be widened, turned, rounded or compared, or lie on another device.
        """
        if slot.layout != "plain" or slot.inner in self._staged or self.is_tied_head(name):
            return None
        place = slot.read(self._parameters[slot.inner].detach())
        as_it_is = place.dtype == dtype and place.is_cpu and place.is_contiguous() and place.shape == slot.shape
        return place if as_it_is else None

    def put(self, name: str, slot: Slot, tensor: Tensor) -> None:
        """Copy a claimed tensor into place; a tied head is only compared.

        Raises:
            CheckpointError: a tied head that differs from the embedding, or a quantized weight that says another shape.
        """
        staged = self._staged.get(slot.inner)
        if self.is_tied_head(name):
            parameter = self._parameters.get(slot.inner)
            same = staged.agrees(tensor) if staged else parameter is not None and _equal(tensor, parameter)
            if not same:
                raise CheckpointError(
                    f"'{name}' differs from the embedding although config.json ties them; "
                    "set tie_word_embeddings to false"
                )
        elif staged:
            staged.put(name, slot, tensor, len(self.layouts.covered(slot)))
        else:
            slot.write(self._parameters[slot.inner], tensor)

    def finish(self) -> list[str]:
        """Refuse a decoder with holes; the parameters that may lack, and do, by name.

        Raises:
            CheckpointError: naming the missing tensors.
        """
        empty = [slot for name, slot in self.layouts.slots.items() if name not in self._filled]
        missing = [slot.name for slot in empty if slot.inner not in self._exchange.lacking]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"the checkpoint lacks {', '.join(repr(name) for name in missing[:3])}{more}")
        return [slot.inner for slot in empty]


class Staged:
    """A quantized weight whose parts come one by one; it goes into its panels when all `missing` are there."""

    def __init__(self, module: QuantLinear, missing: int) -> None:
        self.module = module
        self._missing = self._all = missing
        self._held: dict[str, Tensor] = {}

    def put(self, name: str, slot: Slot, tensor: Tensor, worth: int) -> None:
        """One tensor, that counts for `worth` parts."""
        if not isinstance(slot, Piece):
            slot.write(self._room("float", tensor.dtype, self.module.k), tensor)
        elif slot.part == "shape":
            if tensor.tolist() != list(slot.whole.shape):
                raise CheckpointError(f"'{name}' says {tensor.tolist()}; config.json asks for {slot.whole.shape}")
        else:
            format = self.module.format
            width = self.module.k if slot.part == "codes" else format.groups(self.module.k)
            dtype = format.scale_dtype if slot.part == "scale" else format.code_dtype
            slot.put(self._room(slot.part, dtype, width), tensor)
        self._missing -= worth
        if not self._missing:
            self._close(name)

    def _room(self, part: str, dtype: torch.dtype, width: int) -> Tensor:
        if part not in self._held:
            self._held[part] = torch.empty(*self.module.shape[:-1], width, dtype=dtype)
        return self._held[part]

    def _close(self, name: str) -> None:
        held, format = self._held, self.module.format
        self._held, self._missing = {}, self._all
        if "float" in held and "codes" in held:
            raise CheckpointError(f"parts of the weight around '{name}' are quantized, others are not")
        if "float" in held:
            self.module.round(held["float"])
        else:
            self.module.put(Quantized(held["codes"], held["scale"], held.get("zero"), format))

    def agrees(self, tensor: Tensor) -> bool:
        """Whether float weights are what these codes were rounded from, as far as a step allows."""
        quantized = self.module.quantized
        off = (quantized.dequantize() - tensor.float()).abs().amax(-1, keepdim=True)
        return bool((off <= quantized.scale.float().abs()).all())


def _equal(tensor: Tensor, parameter: Tensor) -> bool:
    return torch.equal(tensor.to(parameter.device, parameter.dtype), parameter)
