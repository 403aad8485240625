"""Checkpoints that are whole or not there, and a store that always knows the newest good one.

    checkpoints/step-00000200/
        config.json  model.safetensors  tokenizer.json ...   a plain Hugging Face directory
        optimizer.safetensors                                moments, and the fp32 masters of a bf16 run
        trainer.json                                         the position: step, tokens, random state, recipe
        manifest.json                                        size and SHA-256 of every file, and of itself

A write goes to a temporary name, every file is flushed to the disk, the manifest last, then the directory is renamed
and its parent flushed: a crash at any moment leaves a leftover with a temporary name, never half a checkpoint.
What is damaged later (a bit, a truncation, a lost file) is found by the manifest, named, and set aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import CheckpointError
from ..models.shards import Pending, Shard, write_shard

MANIFEST, POSITION, OPTIMIZER = "manifest.json", "trainer.json", "optimizer.safetensors"
_TEMPORARY, _OLD, _DAMAGED = ".tmp-", ".old-", "damaged-"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, besides its tensors: the next batch is number `step`, for data is a function of it."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skips_in_row: int = 0
    rng: str = ""
    scaler: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoint directories of one run."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint by name, oldest first."""
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())

    def save(self, position: Position, tensors: dict[str, Tensor], write_model: Callable[[Path], None]) -> Path:
        """Write one checkpoint and let the oldest go; `write_model` fills a directory with the model's own files."""
        self.clean()
        final = self.path(position.step)
        temporary = self.directory / f"{_TEMPORARY}{final.name}"
        temporary.mkdir()
        write_model(temporary)
        write_shard(temporary / OPTIMIZER, [_pending(name, tensor.detach()) for name, tensor in tensors.items()])
        text = json.dumps(asdict(position), indent=1, default=str)
        (temporary / POSITION).write_text(text + "\n", encoding="utf-8")
        seal(temporary)
        if final.exists():
            final.rename(self.directory / f"{_OLD}{final.name}")
        temporary.rename(final)
        _flush(self.directory)
        for step in self.steps()[: -self.keep_last]:
            self.path(step).rename(self.directory / f"{_OLD}{self.path(step).name}")
        self.clean()
        return final

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and one line for each damaged one found above it, which is set aside."""
        self.clean()
        notes: list[str] = []
        for step in reversed(self.steps()):
            fault = damage(self.path(step))
            if fault is None:
                return self.path(step), notes
            aside = self.directory / f"{_DAMAGED}{self.path(step).name}"
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
            notes.append(f"checkpoint {self.path(step).name} is damaged ({fault}); set aside as {aside.name}")
        return None, notes

    def clean(self) -> None:
        """Remove what a crashed write or an unfinished removal left."""
        for entry in self.directory.iterdir():
            if entry.name.startswith((_TEMPORARY, _OLD)):
                shutil.rmtree(entry)

    def clear(self) -> None:
        """Remove every checkpoint, for a run that starts afresh."""
        self.clean()
        for step in self.steps():
            shutil.rmtree(self.path(step))


def read_position(directory: Path) -> Position:
    """The position of a checkpoint that `damage` found whole.

    Raises:
        CheckpointError: written by another version of the trainer.
    """
    try:
        return Position(**json.loads((directory / POSITION).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / POSITION} is not a position of this trainer: {error}") from None


def read_optimizer(directory: Path) -> dict[str, Tensor]:
    """The optimizer's tensors by name, views of the file: they take memory when they are read."""
    shard = Shard(directory / OPTIMIZER)
    return {name: shard.tensor(name) for name in shard.entries}


def seal(directory: Path) -> None:
    """Flush every file, then write and flush the manifest."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        _flush(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    manifest = {"files": files, "sha256": _own_digest(files)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(directory / MANIFEST)
    for path in [p for p in directory.rglob("*") if p.is_dir()]:
        _flush(path)
    _flush(directory)


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, the file first, or None when it is whole."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["sha256"] != _own_digest(files):
            return f"{MANIFEST}: its own SHA-256 does not match"
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST}: not readable"
    for name, entry in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name}: missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name}: {size} bytes, {entry['bytes']} were written"
        if digest(path) != entry["sha256"]:
            return f"{name}: SHA-256 does not match"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory under a temporary name, flush it, and put it in `target`'s place."""
    temporary, old = (target.with_name(f"{mark}{target.name}") for mark in (_TEMPORARY, _OLD))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of `names` that `source` has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _pending(name: str, tensor: Tensor) -> Pending:
    return Pending(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), values=lambda: tensor)


def _own_digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
