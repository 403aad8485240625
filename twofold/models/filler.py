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
from ..quant.linear import QuantLinear
from ..quant.stored import Stored
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
            counts[slot.inner] = counts.get(slot.inner, 0) + (not isinstance(slot, Piece) or slot.needed)
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
        slot = None if spare else self.layouts.find(name, codes=dtype.itemsize < 2 or not dtype.is_floating_point)
        if slot is None:
            return None
        if shape != slot.shape and not (isinstance(slot, Piece) and not slot.needed):
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
            if dtype not in slot.dtypes:
                wanted = " or ".join(map(str, slot.dtypes))
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
        empty = [slot for slot in empty if not isinstance(slot, Piece) or slot.needed]
        missing = [slot.name for slot in empty if slot.inner not in self._exchange.lacking]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"the checkpoint lacks {', '.join(repr(name) for name in missing[:3])}{more}")
        return [slot.inner for slot in empty]


class Staged:
    """A quantized weight whose parts come one by one; it goes into its panels when all `missing` are there.

    Parts of one matrix are decoded together, and the matrices put together as the decoder has them.
    """

    def __init__(self, module: QuantLinear, missing: int) -> None:
        self.module = module
        self._missing = self._all = missing
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._held: dict[str, Tensor] = {}

    def put(self, name: str, slot: Slot, tensor: Tensor, worth: int) -> None:
        """One tensor, that counts for `worth` parts."""
        if not isinstance(slot, Piece):
            slot.write(self._room("float", tensor.dtype, self.module.k), tensor)
        elif not slot.needed:
            if why := slot.stored.spare(slot.part, tensor):
                raise CheckpointError(f"tensor '{name}': {why}")
            return
        else:
            parts = self._parts.setdefault(slot.whole.name, {})
            parts[slot.part] = tensor.clone()
            names = slot.stored.parts(slot.whole.name, *slot.whole.shape)
            if all(key in parts for key, part in names.items() if part.needed):
                self._decode(name, slot, self._parts.pop(slot.whole.name))
        self._missing -= worth
        if not self._missing:
            self._close(name)

    def _decode(self, name: str, slot: Piece, parts: dict[str, Tensor]) -> None:
        """The parts of one matrix into its place among the codes, scales and zeros."""
        try:
            found = slot.stored.decode(parts, *slot.whole.shape).cast(self.module.format)
        except CheckpointError as error:
            raise CheckpointError(f"around tensor '{name}': {error}") from None
        for key, numbers in (("codes", found.codes), ("scale", found.scale), ("zero", found.zero)):
            if numbers is not None:
                slot.whole.write(self._room(key, numbers.dtype, numbers.shape[-1]), numbers)
        if found.order is not None:
            first = self._held.setdefault("order", found.order)
            if not torch.equal(first, found.order):
                raise CheckpointError(
                    f"around tensor '{name}': matrices that are multiplied as one have their inputs in different orders"
                )

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
            parts = held["codes"], held["scale"], held.get("zero")
            self.module.put(Quantized(*parts, format, held.get("order")))

    def agrees(self, tensor: Tensor) -> bool:
        """Whether float weights are what these codes were rounded from, as far as a step allows."""
        quantized = self.module.quantized
        off = (quantized.dequantize() - tensor.float()).abs().amax(-1, keepdim=True)
        return bool((off <= quantized.scale.float().abs()).all())


def _equal(tensor: Tensor, parameter: Tensor) -> bool:
    return torch.equal(tensor.to(parameter.device, parameter.dtype), parameter)
