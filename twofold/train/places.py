"""Places: where each tensor of this rank's decoder lies in the whole model, whatever axes divided it.

pipeline          names that are elsewhere are not here
tensor parallel   a box of each fused part: q0 k0 v0 of [q | k | v]
expert parallel   some experts of that
ZeRO              some rows of that
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..models.cuts import Cut as Division
from ..models.decoder import Decoder
from .axes import Axes
from .pieces import Cut, Held, full


class Places:
    """A Held by each name of `decoder`; `whole` has the shape of every tensor of the model."""

    def __init__(self, decoder: Decoder, axes: Axes) -> None:
        self.spec = axes.tensor.whole if axes.tensor else decoder.spec
        model = decoder if axes.mesh.alone else Decoder(self.spec, device="meta")
        self.whole = {name: tuple(tensor.shape) for it in (decoder, model) for name, tensor in named(it)}
        self._held = {}
        for name, tensor in named(decoder):
            place = held(tensor)
            if rows := axes.experts.get(name):
                all_experts = (rows.whole, *tensor.shape[1:])
                place = Held.box(all_experts, ((rows.start, rows.stop), *full(all_experts)[1:])).of(place)
            if axes.tensor and (cut := axes.tensor.cut(name)).segments:
                place = divided(self.whole[name], cut, axes.tensor.ranks, axes.tensor.rank).of(place)
            self._held[name] = place

    def __getitem__(self, name: str) -> Held:
        return self._held[name]

    def get(self, name: str) -> Held | None:
        """What this rank has of a tensor, if it is the decoder's and here."""
        return self._held.get(name)


def named(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A decoder's parameters and buffers."""
    yield from decoder.named_parameters()
    yield from decoder.named_buffers()


def trained(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Of those, what a checkpoint has the weights of: all, or adapters where the rest is frozen."""
    frozen = any(not parameter.requires_grad for parameter in decoder.parameters())
    return ((name, tensor) for name, tensor in named(decoder) if tensor.requires_grad or not frozen)


def held(tensor: Tensor) -> Held:
    """What FSDP2 gave this rank of a tensor: rows as torch.chunk deals them; all of what it did not divide."""
    box = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                first, last = box[placement.dim]
                ranks, rank = tensor.device_mesh.size(axis), tensor.device_mesh.get_local_rank(axis)
                each = -(-(last - first) // ranks)
                begin = min(first + rank * each, last)
                box[placement.dim] = (begin, min(begin + each, last))
    return Held.box(tensor.shape, tuple(box))


def divided(shape: tuple[int, ...], cut: Division, ranks: int, rank: int) -> Held:
    """What a tensor parallel rank has of a whole tensor: a span of each fused part, end to end."""
    spans = [(span.start, span.stop) for span in cut.spans(ranks, rank)]
    ends = list(accumulate((last - first for first, last in spans), initial=0))
    local = (*shape[: cut.dim], ends[-1], *shape[cut.dim + 1 :])
    cuts = []
    for span, begin, end in zip(spans, ends, ends[1:], strict=False):
        boxes = []
        for sizes, along in ((shape, span), (local, (begin, end))):
            box = full(sizes)
            boxes.append((*box[: cut.dim], along, *box[cut.dim + 1 :]))
        if end > begin:
            cuts.append(Cut(*boxes))
    return Held(shape, local, tuple(cuts))
