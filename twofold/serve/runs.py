"""Runs: what the training page shows, read from the run directories that `twofold train` writes.

    runs/                         the directory that is looked through
        small/log.jsonl           a run, called "small"
        pybot/chat/log.jsonl      another, called "pybot/chat"
            checkpoints/step-00000200/trainer.json     what says how many steps there will be
            model/                there when it has finished
                evaluation.json   what `twofold evaluate` found of it

A log grows while it is read, and is cut back when a run goes on from a checkpoint. So each is read once, from where it
was left; a line without its end is left for the next time; and a log that is no longer the one that was read gets a
new `version`, which tells whoever counts its rows to begin again.

Rows of rollouts are large and many. Among a run's rows each stands as the number of its answers alone, and is read
again when somebody asks for that one row.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import statistics
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import HttpError

LOG = "log.jsonl"
EVALUATION = "evaluation.json"
DEPTH = 4
MOST_RUNS = 1000
MOST_ROWS = 4000
MOST_CHECKPOINTS = 100
MOST_EVALUATIONS = 20
MOST_BYTES = 1 << 20
MOST_ROW_BYTES = 8 << 20
QUIET_SECONDS = 60.0  # a run that says nothing for so long, and for QUIET_GAPS of its usual waits, has stopped
QUIET_GAPS = 20.0

Row = dict[str, Any]


class Log:
    """One log: where its rows end, and what they said last. Rows are kept on the disk alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.version = secrets.token_hex(4)
        self.latest: Row = {}
        self.began: float | None = None
        self.times: deque[float] = deque(maxlen=64)
        self._ends = array("Q", [0])
        self._large: dict[int, Row] = {}  # what stands for a row of rollouts, by its number
        self._line = b""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def refresh(self) -> None:
        """Read what has been added."""
        with _open(self.path) as file:
            self._refresh(file)

    def rows(self, since: int, version: str | None, most: int = MOST_ROWS) -> tuple[int, list[Row]]:
        """At most `most` rows from number `since` on, and the number of the first: 0 where `version` is not ours."""
        with _open(self.path) as file:
            self._refresh(file)
            first = since if version in (None, self.version) and since <= len(self) else 0
            found = [self._large.get(number) or self._read(file, number) for number in range(first, len(self))[:most]]
        return first, [row for row in found if row is not None]

    def row(self, number: int, version: str) -> Row | None:
        """One row, whole; None where `version` is not ours, or there is no such row, or it is too large to send."""
        with _open(self.path) as file:
            self._refresh(file)
            there = version == self.version and 0 <= number < len(self)
            if not there or self._ends[number + 1] - self._ends[number] > MOST_ROW_BYTES:
                return None
            return self._read(file, number)

    @property
    def quiet(self) -> bool:
        """Whether the last row is older than a run that goes on would let it be."""
        if not self.times:
            return True
        waits = [after - before for before, after in zip(self.times, list(self.times)[1:], strict=False)]
        usual = statistics.median(waits) if waits else 0.0
        return time.time() - self.times[-1] > max(QUIET_SECONDS, QUIET_GAPS * usual)

    def _refresh(self, file: BinaryIO) -> None:
        if not self._same(file):
            self._begin()
        file.seek(self._ends[-1])
        for line in file:
            row = _row(line)
            if row is None or not line.endswith(b"\n"):
                return
            if isinstance(row.get("rollouts"), list):
                row["rollouts"] = len(row["rollouts"])
                self._large[len(self)] = row
            self._ends.append(self._ends[-1] + len(line))
            self._line = line
            self.latest |= row
            if isinstance(row.get("time"), int | float):
                self.times.append(row["time"])
                self.began = self.began or row["time"]

    def _read(self, file: BinaryIO, number: int) -> Row | None:
        file.seek(self._ends[number])
        return _row(file.read(self._ends[number + 1] - self._ends[number]))

    def _same(self, file: BinaryIO) -> bool:
        """Whether the last row that was read is still where it was."""
        file.seek(self._ends[-1] - len(self._line))
        return file.read(len(self._line)) == self._line


class Runs:
    """The runs below a directory, by their path below it. A run is one that was found: a name never becomes a path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._logs: dict[str, Log] = {}
        self._steps: dict[Path, int | None] = {}
        self._told: dict[Path, tuple[float, list[dict[str, Any]]]] = {}
        self._lock = threading.Lock()

    def listing(self) -> list[dict[str, Any]]:
        """Every run in a few numbers, the one that wrote last first."""
        with self._lock:
            self._find()
            found = []
            for name, log in self._logs.items():
                with contextlib.suppress(OSError):  # it went away meanwhile
                    log.refresh()
                    found.append(self._summary(name, log))
        return sorted(found, key=lambda run: (run["seconds"] is None, run["seconds"]))

    def rows(self, name: str, since: int = 0, version: str | None = None) -> dict[str, Any]:
        """The rows of a run from number `since` on; `more` says that there are further ones to ask for.

        Raises:
            HttpError: 404 for a name that is no run's.
        """
        with self._log(name) as log:
            first, rows = log.rows(since, version)
            return {"version": log.version, "from": first, "rows": rows, "more": first + len(rows) < len(log)}

    def row(self, name: str, number: int, version: str) -> dict[str, Any]:
        """One row of a run with all that is in it: `{"version": ..., "row": {...}}`.

        Raises:
            HttpError: 404 for a name that is no run's, and for a row that is not there, or no longer.
        """
        with self._log(name) as log:
            row = log.row(number, version)
            if row is None:
                why = f"the run {name!r:.100} has no row {number} of this version that can be sent"
                raise HttpError(404, why, code="row_not_found")
            return {"version": log.version, "row": row}

    @contextlib.contextmanager
    def _log(self, name: str) -> Iterator[Log]:
        with self._lock:
            if name not in self._logs:
                self._find()
            if name not in self._logs:
                raise HttpError(404, f"no run {name!r:.100} here: see /runs", code="run_not_found")
            try:
                yield self._logs[name]
            except OSError:
                raise HttpError(404, f"the run {name!r:.100} is gone: see /runs", code="run_not_found") from None

    def _find(self) -> None:
        places = dict(_walk(self.root, ""))
        self._logs = {name: self._logs.get(name) or Log(path / LOG) for name, path in places.items()}

    def _summary(self, name: str, log: Log) -> dict[str, Any]:
        folder, latest = log.path.parent, log.latest
        checkpoints = _checkpoints(folder / "checkpoints")
        steps = self._total(checkpoints[-1][1] / "trainer.json") if checkpoints else None
        told = log.times[-1] if log.times else None
        done = steps is not None and latest.get("step", 0) >= steps
        if not done and told is not None:
            done = _time(folder / "model") >= told
        return {
            "name": name,
            "state": "finished" if done else "stopped" if log.quiet else "running",
            "version": log.version,
            "rows": len(log),
            "steps": steps,
            **{key: latest.get(key) for key in ("step", "loss", "valid_loss", "tokens", "tokens_per_second")},
            "began": log.began,
            "seconds": None if told is None else round(max(time.time() - told, 0.0), 1),
            "evaluations": self._evaluations(folder),
            "checkpoints": [{"step": step, "time": _time(path)} for step, path in checkpoints[-MOST_CHECKPOINTS:]],
        }

    def _evaluations(self, folder: Path) -> list[dict[str, Any]]:
        """What `twofold evaluate` found of a run and of its finished model, by task; a file is read when it changes."""
        found: dict[str, dict[str, Any]] = {}
        for path in (folder / EVALUATION, folder / "model" / EVALUATION):
            when = _time(path)
            if path not in self._told or self._told[path][0] != when:
                self._told[path] = when, _told_in(path) if when else []
            found |= {one["task"]: one for one in self._told[path][1]}
        return [found[task] for task in sorted(found)]

    def _total(self, position: Path) -> int | None:
        """How many steps the run of a checkpoint will have; a checkpoint does not change, so it is read once."""
        if position not in self._steps:
            try:
                steps = json.loads(position.read_bytes())["recipe"]["schedule.steps"]
            except (OSError, ValueError, LookupError, TypeError):
                steps = None
            self._steps[position] = steps if isinstance(steps, int) else None
        return self._steps[position]


def _walk(folder: Path, name: str, depth: int = DEPTH) -> Iterator[tuple[str, Path]]:
    """Names and places of runs; links are not followed, and nothing is looked for inside a run."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name == LOG and entry.is_file(follow_symlinks=False) for entry in entries):
        yield name or folder.resolve().name, folder
        return
    if depth == 0:
        return
    count = 0
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            for found in _walk(folder / entry.name, f"{name}/{entry.name}".lstrip("/"), depth - 1):
                yield found
                count += 1
                if count >= MOST_RUNS:
                    return


def _told_in(path: Path) -> list[dict[str, Any]]:
    """The records of one file; none where it is not such a file, or larger than any would be."""
    try:
        with _open(path) as file:
            found = json.loads(file.read(MOST_BYTES))["evaluations"]
        return [one for one in found if isinstance(one, dict) and isinstance(one.get("task"), str)][:MOST_EVALUATIONS]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return []


def _open(path: Path) -> BinaryIO:
    """A plain file, never what a link or a pipe in its place would lead to."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(f"{path} is not a plain file")
    return os.fdopen(file, "rb")


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    steps = sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdecimal())
    return [(step, folder / f"step-{step:08d}") for step in steps]


def _time(path: Path) -> float:
    """When a file or directory was last changed, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
