"""python_passes_tests: the share of a row's tests that a completion's code passes, each in a court of its own.

What the court withstands, and what not, is in docs/rewards.md.
"""

from __future__ import annotations

import math
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...platforms.cores import usable_cores
from . import wire
from .config import RewardConfig
from .court.walls import WALLS
from .extract import code_of
from .wire import Batch, Fault, Scored

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import court.judge; del sys.path[0]; court.judge.main()"
_HERE = str(Path(__file__).parent)
_GRACE = 2.0  # seconds for a judge to start and to speak, beside what the candidate has
_ALONE = ("-P", "-s", "-S", "-B")  # as -I, but for the seed of hashes in its environment, which is all that is there
_BARE = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"}


class Verdict(msgspec.Struct, frozen=True):
    """What a judge says of one completion; `fault` when it is not the completion's: of the tests, or of the court."""

    passed: int = 0
    tests: int = 1
    why: str = ""
    walls: list[str] = []
    fault: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program and the tests it is to pass."""

    code: str
    tests: str | tuple[str, ...]
    entry: str | None


class Court:
    """One usher's process: started when first asked, ended and started again when a judge does not answer in time."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="court-", ignore_cleanup_errors=True)
        self._usher: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def judge(self, job: Job) -> Verdict:
        """The verdict on one program; whatever the program or its tests do is in it."""
        link = self._link or self._open()
        deadline = time.monotonic() + self._config.seconds + _GRACE
        try:
            wire.send(link, wire.encode(vars(job)), deadline)
            return wire.receive(link, Verdict, deadline)
        except wire.Broken as broken:
            self._close()
            if broken.reason == "timeout":
                return Verdict(why="out of time")
            return Verdict(fault=f"got no verdict: the judges' process {broken}", reason="court")

    def _open(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        limits = [str(self._config.seconds), str(self._config.megabytes), self._folder.name]
        words = [sys.executable, *_ALONE, "-c", _BOOT, _HERE, *limits]
        with theirs:
            self._usher = subprocess.Popen(words, stdin=theirs.fileno(), env=_BARE, cwd=self._folder.name)
        self._link = ours
        return ours

    def _close(self) -> None:
        """The judge dies with its usher, and the candidate with its judge."""
        if self._link is not None and self._usher is not None:
            self._link.close()
            self._usher.kill()
            self._usher.wait()
        self._link = None


def batch_seconds(config: RewardConfig, count: int) -> float:
    """How long a batch may take when every completion uses all of its time: hanging must not buy an empty verdict."""
    return max(config.timeout, math.ceil(count / usable_cores()) * (config.seconds + _GRACE) + 5.0)


class PassesTests:
    """Judges as many completions at once as there are cores; equal ones once."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(usable_cores(), "judge")
        self._free: queue.SimpleQueue[Court] = queue.SimpleQueue()
        for _ in range(usable_cores()):
            self._free.put(Court(config))

    def __call__(self, batch: Batch) -> Scored:
        jobs = [self._job(batch, i) for i in range(len(batch))]
        unique = list(dict.fromkeys(job for job in jobs if job is not None))
        verdicts = dict(zip(unique, self._pool.map(self._judge, unique)))
        values: list[float | None] = []
        faults: Counter[tuple[str, str]] = Counter()
        for job in jobs:
            verdict = verdicts[job] if job else Verdict(fault=f"has no '{self._config.tests}' in a row", reason="tests")
            if verdict.fault:
                faults[verdict.reason, verdict.fault] += 1
            values.append(None if verdict.fault else self._value(verdict))
        said = [Fault(reason, count, note) for (reason, note), count in faults.items()]
        return Scored(values, said + self._missing(verdicts))

    def _job(self, batch: Batch, i: int) -> Job | None:
        config = self._config
        row: Mapping[str, Any] = {name: column[i] for name, column in batch.columns.items()}
        tests, entry = row.get(config.tests), row.get(config.entry)
        if not tests or not isinstance(tests, str | list):
            return None
        code = code_of(batch.prompts[i], batch.completions[i], prefix=config.prefix)
        return Job(
            code=code,
            tests=tests if isinstance(tests, str) else tuple(map(str, tests)),
            entry=str(entry) if entry else None,
        )

    def _judge(self, job: Job) -> Verdict:
        court = self._free.get()
        try:
            return court.judge(job)
        finally:
            self._free.put(court)

    def _value(self, verdict: Verdict) -> float:
        share = verdict.passed / verdict.tests
        return share if self._config.partial else float(verdict.passed == verdict.tests)

    def _missing(self, verdicts: Mapping[Job, Verdict]) -> list[Fault]:
        """One line, no completion lost, when this machine lacks a wall."""
        stood = [set(verdict.walls) for verdict in verdicts.values() if verdict.walls]
        lacking = [wall for wall in WALLS if stood and wall not in set.intersection(*stood)]
        note = f"runs candidates without {', '.join(lacking)}: this machine does not allow it, see docs/rewards.md"
        return [Fault("walls", 0, note)] if lacking else []
