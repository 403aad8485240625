"""python_passes_tests: the share of a row's tests that a completion's code passes, each in a court of its own.

What the court withstands, and what not, is in docs/rewards.md.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...platforms.cores import usable_cores
from .config import RewardConfig
from .court.walls import WALLS
from .extract import code_of
from .wire import Batch, Fault, Scored

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import court.judge; del sys.path[0]; court.judge.main()"
_HERE = str(Path(__file__).parent)
_GRACE = 2.0  # seconds for a judge to start and to speak, beside what the candidate has
_BARE = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC"}


class Verdict(msgspec.Struct, frozen=True):
    """What a judge says of one completion; `fault` when the tests themselves are at fault."""

    passed: int = 0
    tests: int = 1
    why: str = ""
    walls: list[str] = []
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program and the tests it is to pass."""

    code: str
    tests: str | tuple[str, ...]
    entry: str | None


def batch_seconds(config: RewardConfig, count: int) -> float:
    """How long a batch may take when every completion uses all of its time: hanging must not buy an empty verdict."""
    return max(config.timeout, math.ceil(count / usable_cores()) * (config.seconds + _GRACE) + 5.0)


class PassesTests:
    """Judges as many completions at once as there are cores; equal ones once."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(usable_cores(), "judge")

    def __call__(self, batch: Batch) -> Scored:
        jobs = [self._job(batch, i) for i in range(len(batch))]
        unique = list(dict.fromkeys(job for job in jobs if job is not None))
        verdicts = dict(zip(unique, self._pool.map(self._judge, unique)))
        values: list[float | None] = []
        faults: Counter[tuple[str, str]] = Counter()
        for job in jobs:
            verdict = verdicts[job] if job else Verdict(fault=f"a row has no '{self._config.tests}'")
            if verdict.fault:
                faults["tests", verdict.fault] += 1
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
        config = self._config
        with tempfile.TemporaryDirectory(prefix="court-", ignore_cleanup_errors=True) as folder:
            words = [sys.executable, "-I", "-S", "-c", _BOOT, _HERE, str(config.seconds), str(config.megabytes), folder]
            judge = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_BARE, cwd=folder
            )
            try:
                said, complaint = judge.communicate(msgspec.json.encode(vars(job)), config.seconds + _GRACE)
            except subprocess.TimeoutExpired:
                judge.kill()
                judge.communicate()
                return Verdict(why="out of time")
        try:
            return msgspec.json.decode(said, type=Verdict)
        except msgspec.MsgspecError:
            last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
            return Verdict(why=f"no verdict: {last}"[:200])

    def _value(self, verdict: Verdict) -> float:
        share = verdict.passed / verdict.tests
        return share if self._config.partial else float(verdict.passed == verdict.tests)

    def _missing(self, verdicts: Mapping[Job, Verdict]) -> list[Fault]:
        """One line, no completion lost, when this machine lacks a wall."""
        stood = [set(verdict.walls) for verdict in verdicts.values() if verdict.walls]
        lacking = [wall for wall in WALLS if stood and wall not in set.intersection(*stood)]
        note = f"runs candidates without {', '.join(lacking)}: this machine does not allow it, see docs/rewards.md"
        return [Fault("walls", 0, note)] if lacking else []
