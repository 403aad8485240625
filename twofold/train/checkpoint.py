"""Checkpoints that are whole or not there, and a store that always knows the newest good one.

    checkpoints/step-00000200/
        config.json  model.safetensors  tokenizer.json ...   a plain Hugging Face directory
        state-00001-of-00004.safetensors ...                 moments, fp32 masters, random states: a file a rank
        state.index.json                                     which box of which tensor is in which of them
        trainer.json                                         the position: step, tokens, recipe
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core import CheckpointError
from ..parallel.comm import Group
from ..parallel.messages import everyone, from_first

MANIFEST, POSITION = "manifest.json", "trainer.json"
_TEMPORARY, _OLD, _DAMAGED = ".tmp-", ".old-", "damaged-"

Notes = Mapping[str, Any]
"""Of each file by its name: its bytes and its SHA-256."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, besides its tensors: the next batch is number `batch`, for data is a function of it."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skips_in_row: int = 0
    loss: float | None = None
    rng: str = ""
    """The random state, where a checkpoint has no state of it: those that one process alone wrote."""
    scaler: dict[str, Any] = field(default_factory=dict)
    passed: int = 0
    """Batches that the run went past when it went back."""
    rewinds: int = 0
    """How often it has gone back to the checkpoint before it."""
    recent: list[float] = field(default_factory=list)
    """Losses that the next one is measured by."""
    data: str = ""
    base: str = ""
    """What its adapters stand beside, where it has some (`adapters.fingerprint`)."""
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """The number of the next batch."""
        return self.step + self.passed


class Checkpoints:
    """The checkpoint directories of one run: the newest `keep_last` stay, and those of every `keep_every` steps."""

    def __init__(self, directory: Path, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.directory = directory
        self.keep_last, self.keep_every = keep_last, keep_every

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def temporary(self, step: int, attempt: str = "") -> Path:
        """Where a checkpoint is written; a name of its own for each attempt, for the dead may still be writing."""
        return self.directory / f"{_TEMPORARY}{self.path(step).name}{attempt and '-'}{attempt}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint by name, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())

    def begin(self, step: int, attempt: str = "") -> Path:
        """An empty directory to write a checkpoint in."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.clean()
        temporary = self.temporary(step, attempt)
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, position: Position, notes: Notes) -> Path:
        """Seal what was written, put it in its place, and let the oldest go; `notes` are of files flushed already."""
        text = json.dumps(asdict(position), indent=1, default=str)
        (temporary / POSITION).write_text(text + "\n", encoding="utf-8")
        seal(temporary, notes)
        final = self.path(position.step)
        if final.exists():
            final.rename(self.directory / f"{_OLD}{final.name}")
        temporary.rename(final)
        _flush(self.directory)
        for step in self.steps()[: -self.keep_last]:
            if not self.keep_every or step % self.keep_every:
                self.path(step).rename(self.directory / f"{_OLD}{self.path(step).name}")
        self.clean()
        return final

    def latest(self, group: Group = None, regular: int = 1) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and one line for each damaged one found above it, which is set aside.

        `regular`: of the steps that this divides, if there is one. A collective: each rank of `group` hashes its share
        of the files, and all find the same.
        """
        main = group is None or group.rank() == 0
        rank, world = (0, 1) if group is None else (group.rank(), group.size())
        if main:
            self.clean()
        notes: list[str] = []
        for step in sorted(from_first(self.steps(), group), key=lambda n: (n % regular == 0, n), reverse=True):
            faults = everyone(damage(self.path(step), rank, world), group)
            fault = next((fault for fault in faults if fault), None)
            if fault is None:
                return self.path(step), notes
            name = self.path(step).name
            notes.append(f"checkpoint {name} is damaged ({fault}); set aside as {_DAMAGED}{name}")
            if main:
                self._set_aside(step)
        return None, notes

    def _set_aside(self, step: int) -> None:
        aside = self.directory / f"{_DAMAGED}{self.path(step).name}"
        shutil.rmtree(aside, ignore_errors=True)
        self.path(step).rename(aside)

    def clean(self) -> None:
        """Remove what a crashed write or an unfinished removal left."""
        for entry in self.directory.iterdir() if self.directory.is_dir() else ():
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
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / POSITION} is not a position of this trainer: {error}") from None


def note(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def seal(directory: Path, notes: Notes | None = None) -> None:
    """Flush every file that has no note yet, then write and flush the manifest."""
    files = dict(notes or {})
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in files:
            _flush(path)
            files[name] = note(path)
    files = dict(sorted(files.items()))
    manifest = {"files": files, "sha256": _own_digest(files)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(directory / MANIFEST)
    for path in [p for p in directory.rglob("*") if p.is_dir()]:
        _flush(path)
    _flush(directory)


def damage(directory: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with a checkpoint, the file first, or None when it is whole; with `world`, a rank's share of it."""
    return next((f"{name}: {fault}" for name, fault in check(directory, rank, world) if fault), None)


def check(directory: Path, rank: int = 0, world: int = 1) -> Iterator[tuple[str, str | None]]:
    """Each file of a checkpoint, and what is wrong with it."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        whole = manifest["sha256"] == _own_digest(files)
    except FileNotFoundError:
        yield MANIFEST, "missing"
        return
    except (ValueError, KeyError, TypeError):
        yield MANIFEST, "not readable"
        return
    yield MANIFEST, None if whole else "its own SHA-256 does not match"
    for name, entry in list(files.items())[rank::world]:
        yield name, _fault(directory / name, entry)


def _fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{size} bytes, {entry['bytes']} were written"
    return None if digest(path) == entry["sha256"] else "SHA-256 does not match"


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory under a temporary name, flush it, and put it in `target`'s place."""
    temporary, old = unfinished(target), target.with_name(f"{_OLD}{target.name}")
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


def unfinished(target: Path) -> Path:
    """Where a directory is written before it takes `target`'s place."""
    return target.with_name(f"{_TEMPORARY}{target.name}")


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")


def _own_digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
