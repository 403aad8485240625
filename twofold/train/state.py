"""What of a run goes into its checkpoints, by name and as pieces, and back.

weights   every parameter by the decoder's name, in the model's dtype
states    exp_avg.<parameter> ...   what the optimizer keeps, divided as the parameter is
          master.<parameter>        its fp32, where the model's dtype is narrower
          buffer.<name>             the decoder's buffers
          rng.<rank>                the random state of each rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..core import CheckpointError
from ..parallel import Mesh
from .checkpoint import Position
from .optimizer import Optimizer
from .pieces import Held, Piece, Stored
from .zero import local

Value = Callable[[str, Held], Tensor]
"""(the decoder's name of a tensor, the part of it that is wanted) to that part."""

MASTER, BUFFER, RANDOM = "master.", "buffer.", "rng."


def held(tensor: Tensor) -> Held:
    """What this rank has of a parameter: of one that FSDP2 divided, rows as torch.chunk deals them."""
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


def _named(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from decoder.named_parameters()
    yield from decoder.named_buffers()


@torch.no_grad()
def fill(decoder: nn.Module, device: str, value: Value) -> None:
    """Memory for a decoder that was divided before it had any, and what `value` says of each part in it."""
    decoder.to_empty(device=device)
    for name, tensor in _named(decoder):
        local(tensor).copy_(value(name, held(tensor)))


def weight_pieces(decoder: nn.Module, dtype: torch.dtype, wider: torch.dtype | None = None) -> dict[str, Piece]:
    """The model's weights in its `dtype`; `wider` is what they are written in, when that is another."""
    pieces = {}
    for name, tensor in _named(decoder):
        mine, kept = local(tensor.detach()), dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
        wanted = (wider or dtype) if isinstance(tensor, nn.Parameter) else tensor.dtype
        pieces[name] = Piece(held(tensor), mine.to(kept) if wanted != kept else mine, wanted)
    return pieces


def state_pieces(decoder: nn.Module, optimizer: Optimizer, mesh: Mesh, dtype: torch.dtype) -> dict[str, Piece]:
    """Everything else that the next step depends on."""
    places = {name: held(p) for name, p in decoder.named_parameters()}
    pieces = {}
    for name, tensor in optimizer.state().items():
        place = places.get(name.partition(".")[2])
        whole = place is None or tuple(tensor.shape) != place.local
        pieces[name] = Piece(Held.all(tensor.shape) if whole or place is None else place, tensor, tensor.dtype)
    for name, parameter in decoder.named_parameters():
        if parameter.dtype != dtype:
            pieces[MASTER + name] = Piece(places[name], local(parameter.detach()), parameter.dtype)
    for name, buffer in decoder.named_buffers():
        pieces[BUFFER + name] = Piece(Held.all(buffer.shape), buffer, buffer.dtype)
    random = torch.get_rng_state()
    pieces[f"{RANDOM}{mesh.rank_in_world}"] = Piece(Held.all(random.shape), random, random.dtype)
    return pieces


@torch.no_grad()
def restore(stored: Stored, position: Position, decoder: nn.Module, optimizer: Optimizer, mesh: Mesh) -> None:
    """Put the optimizer, the buffers and this rank's random state back to where a checkpoint has them.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape; it is named.
    """
    places = {name: held(p) for name, p in decoder.named_parameters()}
    own = {name for name, p in decoder.named_parameters() if p.dtype == torch.float32}  # filled from its master already
    buffers, taken = dict(decoder.named_buffers()), {}
    for name, entry in stored.entries.items():
        owner = name.partition(".")[2]
        if name.startswith(BUFFER):
            if owner not in buffers:
                raise CheckpointError(f"{stored.directory.name} has a buffer this model does not: {owner}")
            buffers[owner].copy_(stored.read(name))
        elif not name.startswith(RANDOM) and not (name.startswith(MASTER) and owner in own):
            place = places.get(owner)
            taken[name] = stored.read(name, place if place is not None and place.shape == entry.shape else None)
    optimizer.load(taken)
    _random(stored, position, mesh)


def _random(stored: Stored, position: Position, mesh: Mesh) -> None:
    """The rank's own state in as many ranks as there were; in another number, one that no rank had."""
    name = f"{RANDOM}{mesh.rank_in_world}"
    if name in stored.entries and stored.world == mesh.size("world"):
        torch.set_rng_state(stored.read(name))
    elif position.rng and mesh.alone:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(position.rng)), dtype=torch.uint8))
    else:
        torch.manual_seed(torch.initial_seed() + (position.step << 20) + mesh.rank_in_world)
