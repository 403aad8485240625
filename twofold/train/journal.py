"""What happened in a run: `log.jsonl`, one JSON object a line, and TensorBoard events made from the same rows.

The JSON lines are the record; what is not finite is null in it. When a run goes on from a checkpoint, rows behind its
step are cut off and the event file is written anew from what is left, so a killed and resumed run leaves the log of one
that was never stopped.

    {"step": 7, "loss": 2.31, "lr": 0.001, "grad_norm": 0.8, "tokens": 57344, "tokens_per_second": 31000, "time": ...}
    {"step": 100, "valid_loss": 2.1, "time": ...}
    {"step": 100, "prompt": "def add(", "text": "a, b):", "time": ...}
    {"step": 12, "skipped": "the gradient is not finite, first in layers.3.down (batch 11)", "batch": 11, "documents":
     [3, 70], "time": ...}
    {"step": 11, "rewound": "the loss, 31.2, is more than 2 times 8.1 ...", "spiked": 17, "passed": [10, 16], ...}
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from . import tfevents

TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "loss_scale": "train/loss_scale",
    "peak_share": "train/peak_share",
    "memory": "train/memory",
    "valid_loss": "valid/loss",
    "moe_busiest": "moe/busiest",
    "moe_dropped": "moe/dropped",
    "moe_balance": "moe/balance",
    "moe_z": "moe/z",
}


class Journal:
    """The rows of one run directory, in memory, in `log.jsonl` and in `tensorboard/`."""

    def __init__(self, directory: Path, keep_to: int = 0) -> None:
        """Open the run's log and keep its rows up to step `keep_to`."""
        self.path = directory / "log.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self._open([row for row in read_rows(self.path) if row["step"] <= keep_to])

    def _open(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(_line(row) for row in self.rows), encoding="utf-8")
        os.replace(fresh, self.path)
        self._lines = self.path.open("ab")
        self._events = _open_events(self.path.parent / "tensorboard", self.rows)

    def rewind(self, step: int) -> None:
        """Forget what happened behind `step`."""
        self.close()
        self._open([row for row in self.rows if row["step"] <= step])

    def add(self, step: int, **values: Any) -> None:
        """Append one row; it is on its way to the disk when this returns."""
        row = {"step": step, **_written(values), "time": round(time.time(), 3)}
        self.rows.append(row)
        self._lines.write(_line(row).encode())
        self._lines.flush()
        self._events.write(_event(row))
        self._events.flush()

    def sync(self) -> None:
        """Wait until every row is on the disk; called before a checkpoint that counts on them."""
        os.fsync(self._lines.fileno())

    def curve(self, key: str) -> list[tuple[float, float]]:
        """The points (step, value) of one number."""
        return [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), int | float)]

    def close(self) -> None:
        self._lines.close()
        self._events.close()


class Unwritten(Journal):
    """The journal of a rank that does not speak."""

    def __init__(self) -> None:
        self.rows = []

    def add(self, step: int, **values: Any) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line torn by a crash is left out, and so is all behind it."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def _written(value: Any) -> Any:
    """As JSON can say it: a number that is not finite is null."""
    if isinstance(value, dict):
        return {key: _written(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_written(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _event(row: dict[str, Any]) -> bytes:
    values = {tag: float(row[key]) for key, tag in TAGS.items() if isinstance(row.get(key), int | float)}
    return tfevents.record(tfevents.scalar_event(row.get("time", 0.0), row["step"], values)) if values else b""


def _open_events(directory: Path, rows: list[dict[str, Any]]) -> BinaryIO:
    directory.mkdir(exist_ok=True)
    for old in directory.glob("events.out.tfevents.*"):
        old.unlink()
    started = rows[0].get("time", 0.0) if rows else time.time()
    out = (directory / f"events.out.tfevents.{int(started)}.twofold").open("wb")
    out.write(tfevents.record(tfevents.version_event(started)))
    for row in rows:
        out.write(_event(row))
    out.flush()
    return out
