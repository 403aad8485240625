"""Heartbeat: a step that takes too long is a hang, and a hang is told once, with everyone's stack, and ended.

    rank 0   beat . beat . beat ..................... late ──> hang/<attempt>/rank-0.json ─┐
    rank 1   beat . beat . (sleeps) ................. late ──> hang/<attempt>/rank-1.json ─┴─> one report, status 76

A thread on each rank looks. The first that finds its step late writes what it sees into the run's directory; the others
see that and write theirs, so that a rank which is well tells too. The lowest rank that wrote anything speaks for all,
then every process ends with status 76: torchrun starts them again, and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..parallel import Mesh, watch

HUNG = 76
"""Exit status of a run that hung."""
FIRST = 5
"""The first step may take so many times as long: it makes what later ones have."""
GRACE = 5.0
"""Seconds that ranks have to tell what they see."""
DEPTH = 16
"""Frames of a stack."""


@dataclass(frozen=True)
class _Beat:
    step: int
    phase: str
    at: float
    limit: float | None


class Heartbeat:
    """Watches this rank's steps while it is entered; with no `seconds` it watches nothing."""

    def __init__(self, folder: Path, mesh: Mesh, seconds: float | None = None, attempt: str = "") -> None:
        """Reports go to `folder`/`attempt`, which all ranks share, and no attempt before had."""
        self.folder, self.mesh, self.seconds = folder / (attempt or "alone"), mesh, seconds
        self.rank, self.world = mesh.rank_in_world, mesh.size("world")
        self._beat = _Beat(0, "start", time.monotonic(), None)
        self._beats = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self.seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """This rank begins `phase` of a step."""
        self._beats += 1
        limit = self.seconds and self.seconds * (FIRST if self._beats == 1 else 1)
        self._beat = _Beat(step, phase, time.monotonic(), limit)

    @contextmanager
    def apart(self, phase: str) -> Iterator[None]:
        """What some ranks do longer than others, inside, is not timed; at its end all wait for the slowest."""
        if self.seconds is None:
            yield
            return
        before = self._beat
        self._beat = _Beat(before.step, phase, time.monotonic(), None)
        yield
        self.mesh.wait()
        self._beat = _Beat(before.step, before.phase, time.monotonic(), before.limit)

    # ---------------------------------------------------------------------------------------- the watching thread
    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._over.wait(min(1.0, self.seconds / 4)):
            beat = self._beat
            late = beat.limit is not None and time.monotonic() - beat.at > beat.limit
            if late or self.folder.exists():
                self._end()

    def _end(self) -> None:
        """Tell, let one rank speak for all, and end the process."""
        self._tell()
        ends = time.monotonic() + GRACE
        while len(told := self._told()) < self.world and time.monotonic() < ends:
            time.sleep(0.05)
        report = self.folder / "report.txt"
        if self.rank == min(told, default=self.rank):
            text = describe(told, self.world)
            report.write_text(text, encoding="utf-8")
            print(text, file=sys.stderr, flush=True)
        ends = time.monotonic() + GRACE
        while not report.exists() and time.monotonic() < ends:
            time.sleep(0.05)
        os._exit(HUNG)

    def _tell(self) -> None:
        beat = self._beat
        note = {
            "step": beat.step,
            "phase": beat.phase,
            "seconds": round(time.monotonic() - beat.at, 1),
            "limit": beat.limit,
            "stacks": stacks(),
            "calls": [asdict(call) for call in watch.calls()] if self.world > 1 else [],
            "groups": {name: [group.name, group.ranks] for name, group in self.mesh.groups().items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = self.folder / f".rank-{self.rank}"
        begun.write_text(json.dumps(note), encoding="utf-8")
        begun.rename(self.folder / f"rank-{self.rank}.json")

    def _told(self) -> dict[int, dict[str, Any]]:
        paths = {rank: self.folder / f"rank-{rank}.json" for rank in range(self.world)}
        return {rank: json.loads(path.read_text(encoding="utf-8")) for rank, path in paths.items() if path.exists()}


def stacks() -> dict[str, list[str]]:
    """Where each thread of this process is, innermost last, but for the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): traceback.format_stack(frame)[-DEPTH:]
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }


def describe(told: Mapping[int, Mapping[str, Any]], world: int) -> str:
    """The report: who is late, the first collective that differs, and where every thread of every rank is."""
    late = [rank for rank, note in told.items() if note["limit"] is not None and note["seconds"] > note["limit"]]
    first = min(late, default=min(told))
    calls = {rank: [watch.Call.read(row) for row in note["calls"]] for rank, note in told.items()}
    note = told[first]
    lines = [f"the run hangs: rank {first} is {note['seconds']:g} s in {note['phase']} of step {note['step'] + 1}"]
    silent = [str(rank) for rank in range(world) if rank not in told]
    if silent:
        lines.append(f"rank {', '.join(silent)} says nothing: its process is gone, or stopped outside of Python")
    if world > 1:
        every = {name: row for note in told.values() for name, row in note["groups"].items()}
        groups = {name: watch.Group(name=called, ranks=tuple(ranks)) for name, (called, ranks) in every.items()}
        lines.append(watch.first_difference(calls, groups) or "all ranks came to the same collectives")
    for rank, note in sorted(told.items()):
        lines.append(f"rank {rank}: {note['phase']} of step {note['step'] + 1} for {note['seconds']:g} s")
        for name, frames in note["stacks"].items():
            lines += [f"  thread {name}:", *("    " + line for frame in frames for line in frame.splitlines())]
    return "\n".join(lines) + "\n"
