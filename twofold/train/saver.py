"""Saver: checkpoints written behind the run's back, each rank its part, and whole or not there.

    step 100 ── copy ── step 101 ── step 102 ── ...                  the run waits for the copy alone
                  └── tables ── weights to their writers ── files, flushed and hashed ── notes ── main: manifest, rename
                      ^ everyone says what it holds          a thread on each rank        ^ everyone says what it wrote

The threads of all ranks talk in a group of their own, so that nothing of theirs comes between the steps' collectives.
Two copies at most are held; a third save waits. What a thread meets is raised at the run's next step, on every rank.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..core import CheckpointError
from ..models.shards import Pending, write_shard
from ..parallel import Mesh
from ..parallel.messages import everyone
from .checkpoint import Checkpoints, Position, note, replace_directory, unfinished, write_json
from .courier import Courier
from .files import Files
from .pieces import INDEX, Pieces, Whole, divide, file_of, index, pending, table

COPIES = 2
PATIENCE = timedelta(days=2)
"""How long a thread waits for a slower one's files; a rank that has died is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one step: the weights by the decoder's names, in the model's dtype, and everything else."""

    position: Position
    weights: Pieces
    states: Pieces

    def copied(self) -> Snapshot:
        """The same in host memory that the next step does not touch."""
        weights, states = ({n: p.copied() for n, p in pieces.items()} for pieces in (self.weights, self.states))
        return Snapshot(position=self.position, weights=weights, states=states)


class Saver:
    """Writes a run's checkpoints. Making one is a collective, and so is each of its verbs."""

    def __init__(
        self, checkpoints: Checkpoints, files: Files, mesh: Mesh, *, attempt: str = "", behind: bool = True
    ) -> None:
        """`behind`: in a thread; else the run waits for the files, and nothing is copied."""
        self.checkpoints, self.files = checkpoints, files
        self.rank, self.world, self.main = mesh.rank_in_world, mesh.size("world"), mesh.main
        self._attempt, self._behind = attempt, behind
        self._group = None if mesh.alone else dist.new_group(backend="gloo", timeout=PATIENCE)
        self._threads: deque[threading.Thread] = deque()
        self._fault: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the last write met something; `wait` says what."""
        return self._fault is not None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint; back as soon as the run may go on.

        Raises:
            CheckpointError: this or an earlier one could not be written.
        """
        if not self._behind:
            self._try(snapshot)
            self.wait()
            return
        while len(self._threads) >= COPIES:
            self._threads.popleft().join()
        self._tell()
        before = self._threads[-1] if self._threads else None
        thread = threading.Thread(target=self._after, args=(before, snapshot.copied()), name="saver", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            CheckpointError: what could not be.
        """
        while self._threads:
            self._threads.popleft().join()
        self._tell()

    def export(
        self,
        target: Path,
        weights: Pieces,
        dtype: torch.dtype,
        files: Files | None = None,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Put the model alone into `target`, in `dtype`, in place of what was there.

        It is written as `files`, if not as the run's; `beside` adds what is about it.
        """
        self.wait()
        files = files or self.files

        def write(directory: Path) -> None:
            everyone(None, self._group)  # the directory is there
            wholes = divide(everyone(table(weights), self._group))
            plan, _, faults = self._put_weights(files, directory, weights, wholes, dtype)
            self._agree(faults, {})
            if self.main:
                files.finish(directory, dtype, plan)
                if beside is not None:
                    beside(directory)

        if self.main:
            replace_directory(target, write)
        else:
            write(unfinished(target))

    def _tell(self) -> None:
        if self._fault is not None:
            raise CheckpointError(self._fault)

    def _after(self, before: threading.Thread | None, snapshot: Snapshot) -> None:
        if before is not None:
            before.join()
        if self._fault is None:
            self._try(snapshot)

    def _try(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:
            why = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            self._fault = f"the checkpoint of step {snapshot.position.step} could not be written: {why}"

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.position.step
        directory = self.checkpoints.temporary(step, self._attempt)
        begun = _attempted(lambda: self.checkpoints.begin(step, self._attempt)) if self.main else None
        told = everyone([begun, table(snapshot.weights), table(snapshot.states)], self._group)
        if told[0][0]:
            raise CheckpointError(f"rank 0: {told[0][0]}")
        weights, states = divide(t[1] for t in told), divide(t[2] for t in told)
        dtype = next(iter(snapshot.weights.values())).dtype if snapshot.weights else torch.float32
        plan, notes, faults = self._put_weights(self.files, directory, snapshot.weights, weights, dtype)
        faults += self._put(
            directory, file_of(self.rank, self.world), pending(snapshot.states, states, self.rank), notes
        )
        try:
            notes = self._agree(faults, notes)
        except CheckpointError:
            if self.main:
                self.checkpoints.clean()  # a full disk is not to stay full
            raise
        if self.main:
            self.files.finish(directory, dtype, plan)
            write_json(directory / INDEX, index(states, self.world))
            self.checkpoints.commit(directory, snapshot.position, notes)

    def _put_weights(
        self, files: Files, directory: Path, pieces: Pieces, wholes: Mapping[str, Whole], dtype: torch.dtype
    ) -> tuple[dict[str, list[Pending]], dict[str, Any], list[str]]:
        """Write this rank's share of the model's files: the plan of all, notes of its own, and what went wrong."""
        courier = Courier(pieces, wholes, self.rank, self._group)
        plan = files.plan(dtype, courier.whole, self.world)
        courier.send([(item.source, n % self.world) for n, items in enumerate(plan.values()) for item in items])
        notes: dict[str, Any] = {}
        faults: list[str] = []
        for number, (file, items) in enumerate(plan.items()):
            if number % self.world == self.rank:
                faults += self._put(directory, file, items, notes)
        courier.finish()
        return plan, notes, faults

    def _put(self, directory: Path, file: str, items: list[Pending], notes: dict[str, Any]) -> list[str]:
        """Write and flush one file and note its hash, or say why not."""

        def write() -> None:
            write_shard(directory / file, items)
            notes[file] = note(directory / file)

        why = _attempted(write)
        return [f"{file}: {why}"] if why else []

    def _agree(self, faults: list[str], notes: Mapping[str, Any]) -> dict[str, Any]:
        """The notes of all ranks, when all is well on all of them."""
        told = everyone([faults, notes], self._group)
        for rank, (found, _) in enumerate(told):
            if found:
                raise CheckpointError(f"rank {rank}: {found[0]}" if self.world > 1 else found[0])
        return {name: entry for _, mine in told for name, entry in mine.items()}


def _attempted(work: Callable[[], object]) -> str | None:
    """Do it; what the disk had against it."""
    try:
        work()
    except OSError as error:
        return f"{error.strerror or error}"
    return None
