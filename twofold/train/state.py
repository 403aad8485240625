"""What of a run goes into its checkpoints, by name and as pieces, and back.

weights   every parameter that is trained by the decoder's name, in the model's dtype
states    exp_avg.<parameter> ...   what the optimizer keeps, divided as the parameter is
          master.<parameter>        its fp32, where the model's dtype is narrower
          buffer.<name>             the decoder's buffers
          rng.<rank>[.cuda]         the random state of each rank, and of its GPU
          lesson.<name>             what a lesson remembers (lesson.py), which takes it back itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core import CheckpointError
from ..models.decoder import Decoder
from ..models.lora import loras
from ..models.peft import AdapterParameters
from ..models.spec import ModelSpec
from ..models.whole import WholeParameters
from ..parallel import Mesh
from ..parallel.messages import everyone
from .checkpoint import Position, read_position
from .courier import Courier
from .optimizer import Optimizer
from .pieces import Held, Piece, Pieces, Stored, divide, table
from .places import Places, named, trained
from .zero import local

Value = Callable[[str, Held], Tensor]
"""(the decoder's name of a tensor, the part of it that is wanted) to that part."""

Source = tuple[Callable[[], Tensor], Callable[[Tensor], None]]
"""How a random state is read, and put back."""

MASTER, BUFFER, RANDOM, LESSON = "master.", "buffer.", "rng.", "lesson."


@torch.no_grad()
def fill(decoder: nn.Module, roots: Sequence[nn.Module], device: str, value: Value, places: Places) -> None:
    """Memory for a decoder that was divided before it had any, and what `value` says of each part in it."""
    for root in roots:
        root.to_empty(device=device)
    for name, tensor in named(decoder):
        local(tensor).copy_(value(name, places[name]))


def saved(source: Path, decoder: nn.Module) -> Value:
    """What a checkpoint has for each parameter: fp32 masters, where there are, before narrow weights."""
    stored = Stored(source)
    whole = AdapterParameters(source, decoder) if loras(decoder) else WholeParameters(source)

    def value(name: str, place: Held) -> Tensor:
        if MASTER + name in stored.entries:
            return stored.read(MASTER + name, place)
        return place.take(whole[name])

    return value


def weight_pieces(
    decoder: nn.Module, places: Places, dtype: torch.dtype, wider: torch.dtype | None = None, every: bool = False
) -> dict[str, Piece]:
    """What is trained of the model, or `every` weight, in its `dtype`; `wider` is what it is written in, if another."""
    pieces = {}
    for name, tensor in named(decoder) if every else trained(decoder):
        mine = local(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            pieces[name] = Piece(places[name], mine.to(dtype) if wider else mine, wider or dtype)
        else:
            pieces[name] = Piece(places[name], mine, mine.dtype)
    return pieces


def state_pieces(
    decoder: nn.Module, places: Places, optimizer: Optimizer, mesh: Mesh, dtype: torch.dtype
) -> dict[str, Piece]:
    """Everything else that the next step depends on."""
    pieces = {}
    for name, tensor in optimizer.state().items():
        place = places.get(name.partition(".")[2])
        if place is None or tuple(tensor.shape) != place.local:
            place = Held.all(tensor.shape)
        pieces[name] = Piece(place, tensor, tensor.dtype)
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            pieces[MASTER + name] = Piece(places[name], local(parameter.detach()), parameter.dtype)
    for name, buffer in () if loras(decoder) else decoder.named_buffers():  # an adapted decoder's are its base's
        pieces[BUFFER + name] = Piece(places[name], buffer, buffer.dtype)
    return pieces | random_pieces(mesh)


@torch.no_grad()
def restore(
    stored: Stored, position: Position, decoder: nn.Module, places: Places, optimizer: Optimizer, mesh: Mesh
) -> None:
    """Put the optimizer, the buffers and this rank's random state back to where a checkpoint has them.

    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape; it is named.
    """
    own = {name for name, p in decoder.named_parameters() if p.dtype == torch.float32}  # filled from its master already
    buffers, taken = dict(decoder.named_buffers()), {}
    for name, entry in stored.entries.items():
        owner = name.partition(".")[2]
        place = places.get(owner)
        if name.startswith((RANDOM, LESSON)) or (name.startswith(MASTER) and owner in own):
            continue
        if place is None and owner in places.whole:
            continue  # it is another rank's
        if name.startswith(BUFFER):
            if owner not in buffers:
                raise CheckpointError(f"{stored.directory.name} has a buffer this model does not: {owner}")
            buffers[owner].copy_(stored.read(name, place))
        else:
            taken[name] = stored.read(name, place if place is not None and place.shape == entry.shape else None)
    optimizer.load(taken)
    put_random_back(stored, position, mesh)


@torch.no_grad()
def go_back(source: Path, decoder: nn.Module, places: Places, optimizer: Optimizer, mesh: Mesh) -> Position:
    """Put a run that has gone on back to where a checkpoint has it, in the memory that it has."""
    position, value = read_position(source), saved(source, decoder)
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            local(parameter.detach()).copy_(value(name, places[name]))
    optimizer.forget()
    restore(Stored(source), position, decoder, places, optimizer, mesh)
    return position


def gathered(pieces: Pieces, spec: ModelSpec, dtype: torch.dtype, mesh: Mesh) -> Decoder | None:
    """The whole model on the main rank, of what all hold between them; None on the others. A collective."""
    group = mesh.group("world")
    wholes = divide(everyone(table(pieces), group))
    courier = Courier(pieces, wholes, mesh.rank_in_world, group)
    courier.send([(name, 0) for name in wholes])
    decoder = Decoder(spec, dtype=dtype) if mesh.main else None
    if decoder is not None:
        tensors = dict(named(decoder))
        for name in wholes:
            tensors[name].copy_(courier.whole(name))
    courier.finish()
    return decoder


def _randomness() -> dict[str, Source]:
    """Where this process has random numbers from, by the end of the name."""
    sources: dict[str, Source] = {"": (torch.get_rng_state, torch.set_rng_state)}
    if torch.cuda.is_initialized():
        sources[".cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return sources


def random_pieces(mesh: Mesh) -> dict[str, Piece]:
    """This rank's random states."""
    found = {f"{RANDOM}{mesh.rank_in_world}{source}": state() for source, (state, _) in _randomness().items()}
    return {name: Piece(Held.all(random.shape), random, random.dtype) for name, random in found.items()}


def put_random_back(stored: Stored, position: Position, mesh: Mesh) -> None:
    """The rank's own states in as many ranks as there were; in another number, ones that no rank had."""
    name = f"{RANDOM}{mesh.rank_in_world}"
    if name in stored.entries and stored.world == mesh.size("world"):
        for source, (_, put_back) in _randomness().items():
            if name + source in stored.entries:  # a run that begins anew on a GPU has none of it yet
                put_back(stored.read(name + source))
    elif position.rng and mesh.alone:
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(position.rng)), dtype=torch.uint8))
    else:
        torch.manual_seed(torch.initial_seed() + (position.step << 20) + mesh.rank_in_world)
