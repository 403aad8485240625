"""Checkpoints with DeepSpeed's names and none of its pickles, whole or not there, read at any number of ranks.

save_dir/latest                      the newest tag
save_dir/global_step200/
    model.safetensors                every weight whole and in fp32, by the module's names, and its buffers
    state-00001-of-00002.safetensors what the optimizer keeps, each rank its slices (`train/pieces.py`)
    state.index.json                 which box of which tensor is in which file
    engine.json                      steps, groups, loss scale, schedule, client_state
    manifest.json                    size and SHA-256 of every file, and of itself
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...core import CheckpointError
from ...models.shards import Pending, Shard, write_shard
from ...parallel import Mesh
from ...parallel.messages import everyone, from_first
from ..checkpoint import damage, seal
from ..pieces import INDEX, Held, Piece, Stored, divide, file_of, index, pending, table
from ..places import held
from ..zero import local
from .masters import Masters
from .optimizer import RuleOptimizer

LATEST, MODEL, ENGINE = "latest", "model.safetensors", "engine.json"


# --------------------------------------------------------------------------------------------- weights
def named_weights(module: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """Parameters and the buffers that a module keeps, by name; a tied one once."""
    kept = module.state_dict().keys()
    found = {name: p for name, p in module.named_parameters() if frozen or p.requires_grad}
    return {**found, **{name: buffer for name, buffer in module.named_buffers() if name in kept}}


def write_weights(path: Path, weights: Mapping[str, Tensor], mesh: Mesh, dtype: torch.dtype | None = None) -> None:
    """Gather one tensor at a time and let the first rank write them; a collective.

    Raises:
        CheckpointError: on every rank, what the disk had against it.
    """
    due = [
        Pending(
            name=name,
            dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
            shape=tuple(tensor.shape),
            values=lambda tensor=tensor: _whole(tensor),  # type: ignore[misc]
        )
        for name, tensor in weights.items()
    ]
    asked = _Counted(due)
    fault = _attempted(lambda: write_shard(path, asked.items)) if mesh.main else None
    for item in due[asked.count :]:  # others give what the first takes; a first that failed takes the rest for nothing
        item.values()
    agree(fault, mesh)


class _Counted:
    """The same tensors, and how many of them were asked for."""

    def __init__(self, due: list[Pending]) -> None:
        self.count = 0
        self.items = [
            Pending(name=item.name, dtype=item.dtype, shape=item.shape, values=self._counting(item)) for item in due
        ]

    def _counting(self, item: Pending) -> Callable[[], Tensor]:
        def values() -> Tensor:
            self.count += 1
            return item.values()

        return values


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


@torch.no_grad()
def read_weights(path: Path, weights: Mapping[str, Tensor], strict: bool) -> None:
    """Fill this rank's part of each weight.

    Raises:
        CheckpointError: a tensor is missing or left over (with `strict`), or has another shape; it is named.
    """
    shard = Shard(path)
    missing, left = sorted(weights.keys() - shard.entries.keys()), sorted(shard.entries.keys() - weights.keys())
    if strict and (missing or left):
        what = f"lacks '{missing[0]}'" if missing else f"has '{left[0]}', which the module does not"
        raise CheckpointError(f"{path} {what} ({len(missing)} missing, {len(left)} left over): not this module's")
    for name, weight in weights.items():
        if name not in shard.entries:
            continue
        shape = shard.entries[name].shape
        if shape != tuple(weight.shape):
            raise CheckpointError(f"{path}: '{name}' is {list(shape)}, the module's is {list(weight.shape)}")
        local(weight.detach()).copy_(held(weight).take(shard.tensor(name)))
        shard.release(name)


# --------------------------------------------------------------------------------------------- the optimizer
def optimizer_state(optimizer: torch.optim.Optimizer, masters: Masters) -> tuple[dict[str, Piece], dict[str, Any]]:
    """What is kept of each master: tensors as pieces, and the rest, with the groups' numbers, as JSON."""
    pieces: dict[str, Piece] = {}
    rest: dict[str, Any] = {}
    for name, master in masters.params.items():
        place = held(masters.weights[name])
        for key, value in optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor):
                sliced = tuple(value.shape) == place.local and value.ndim > 0
                where = place if sliced else Held.all(value.shape)
                pieces[f"{key}.{name}"] = Piece(where, value, value.dtype)
            elif value is not None:
                rest.setdefault(name, {})[key] = value
    groups = [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return pieces, {"kinds": _kinds(optimizer), "groups": groups, "rest": rest}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def load_optimizer(optimizer: torch.optim.Optimizer, masters: Masters, stored: Stored, told: Mapping[str, Any]) -> None:
    """Take the state back, this rank's slices of it.

    Raises:
        CheckpointError: a state of a tensor that is not trained here, or groups of other kinds.
    """
    if told["kinds"] != _kinds(optimizer):
        raise CheckpointError(
            f"{stored.directory.name} has states of {' and '.join(told['kinds'])}, this optimizer's groups are of "
            f"{' and '.join(_kinds(optimizer))}: make it as it was when it was saved, or load_optimizer_states=False"
        )
    for group, saved in zip(optimizer.param_groups, told["groups"]):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for name, entry in stored.entries.items():
        key, _, owner = name.partition(".")
        if owner not in masters.params:
            raise CheckpointError(f"{stored.directory.name} has '{key}' of '{owner}', which is not trained here")
        master, place = masters.params[owner], held(masters.weights[owner])
        value = stored.read(name, place if entry.shape == place.shape and entry.shape else None)
        # a copy of its own: what is read may be a view of the file
        states.setdefault(master, {})[key] = value.to(master.device if value.ndim else "cpu", copy=True)
    for name, values in told["rest"].items():
        states.setdefault(masters.params[name], {}).update(values)
    if isinstance(optimizer, RuleOptimizer):
        optimizer.fill(states)
    else:
        optimizer.state.clear()
        for master, state in states.items():
            optimizer.state[master] = state


def _kinds(optimizer: torch.optim.Optimizer) -> list[str]:
    """What moves each group: a rule, or a client's optimizer by the name of its class."""
    return [str(group.get("rule", type(optimizer).__name__)) for group in optimizer.param_groups]


# --------------------------------------------------------------------------------------------- directories
def write(
    directory: Path, tag: str, mesh: Mesh, weights: Mapping[str, Tensor], pieces: Mapping[str, Piece],
    told: Mapping[str, Any], latest: bool,
) -> Path:  # fmt: skip
    """Write one checkpoint under a temporary name, then put it in its place; a collective.

    Raises:
        CheckpointError: on every rank, why it could not be written; what was there before is as it was.
    """
    group, final, temporary = mesh.group("world"), directory / tag, directory / f".tmp-{tag}"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        text = json.dumps(told, indent=1)
        (temporary / ENGINE).write_text(text + "\n", encoding="utf-8")

    agree(_attempted(begin) if mesh.main else None, mesh)
    write_weights(temporary / MODEL, weights, mesh)
    wholes = divide(everyone(table(pieces), group))
    mine = pending(pieces, wholes, mesh.rank_in_world)
    file = temporary / file_of(mesh.rank_in_world, mesh.size("world"))
    agree(_attempted(lambda: write_shard(file, mine)), mesh)

    def finish() -> None:
        (temporary / INDEX).write_text(json.dumps(index(wholes, mesh.size("world"))) + "\n", encoding="utf-8")
        seal(temporary)
        old = directory / f".old-{tag}"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        if latest:
            fresh = directory / f".tmp-{LATEST}"
            fresh.write_text(tag, encoding="utf-8")
            fresh.replace(directory / LATEST)

    agree(_attempted(finish) if mesh.main else None, mesh)
    return final


def find(directory: Path, tag: str | None, mesh: Mesh) -> Path | None:
    """The checkpoint of a tag, or of `latest`, found whole; None where there is no `latest`. A collective.

    Raises:
        CheckpointError: it is not there or damaged; the file, and the newest that is whole, are named.
    """
    found = from_first(_look(directory, tag) if mesh.main else None, mesh.group("world"))
    if found["fault"]:
        raise CheckpointError(found["fault"])
    return directory / found["tag"] if found["tag"] else None


def read_told(place: Path) -> dict[str, Any]:
    """What an engine said of itself.

    Raises:
        CheckpointError: another version of it did.
    """
    told: dict[str, Any] = json.loads((place / ENGINE).read_text(encoding="utf-8"))
    if told.get("format") != 1:
        raise CheckpointError(f"{place / ENGINE} has format {told.get('format')}, this version reads 1")
    return told


def _look(directory: Path, tag: str | None) -> dict[str, str | None]:
    if tag is None:
        if not (directory / LATEST).is_file():
            return {"tag": None, "fault": None}
        tag = (directory / LATEST).read_text(encoding="utf-8").strip()
    place = directory / tag
    if not place.is_dir():
        return {"tag": tag, "fault": f"{place} is not there; {_others(directory, tag)}"}
    if list(place.glob("*_states.pt")):
        why = "was written by DeepSpeed as pickles, which are never read: run its zero_to_fp32.py --safe_serialization"
        return {"tag": tag, "fault": f"{place} {why}, and load the result into the module before initialize"}
    fault = damage(place)
    return {"tag": tag, "fault": fault and f"{place} is damaged ({fault}); {_others(directory, tag)}"}


def _others(directory: Path, tag: str) -> str:
    entries = directory.iterdir() if directory.is_dir() else ()
    tags = [e for e in entries if (e / ENGINE).is_file() and e.name != tag and not e.name.startswith(".")]
    for entry in sorted(tags, key=lambda entry: entry.stat().st_mtime, reverse=True):
        if damage(entry) is None:
            return f"the newest that is whole: tag='{entry.name}'"
    return "there is no other that is whole"


def agree(fault: str | None, mesh: Mesh) -> None:
    """Raises CheckpointError on every rank when one has met something; a collective."""
    for rank, found in enumerate(everyone(fault, mesh.group("world"))):
        if found:
            raise CheckpointError(f"rank {rank}: {found}" if not mesh.alone else found)


def _attempted(work: Callable[[], object]) -> str | None:
    """Do it; what the disk, or a value that is not JSON, had against it."""
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    return None


def plain_json(what: str, value: Any) -> Any:
    """A value as it comes back from JSON.

    Raises:
        CheckpointError: it holds something that JSON has not; its place is named.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(f"{what}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(f"{what}[{at}]", item) for at, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{what} is a {type(value).__name__}: a checkpoint keeps numbers, text, lists and dicts")
