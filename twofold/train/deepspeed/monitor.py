"""Monitor: what DeepSpeed's monitors tell of each step, as CSV files and as TensorBoard's events."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path

from .. import tfevents


class Monitor:
    """Numbers by tag ("Train/Samples/lr") against the number of samples; with no directory, nothing is written."""

    def __init__(self, csv_directory: Path | None, events_directory: Path | None) -> None:
        self._csv = csv_directory
        self._events: Path | None = None
        for directory in (csv_directory, events_directory):
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
        if events_directory is not None:
            self._events = events_directory / f"events.out.tfevents.{time.time_ns()}.twofold"
            self._events.write_bytes(tfevents.record(tfevents.version_event(time.time())))

    def write(self, samples: int, values: Mapping[str, float]) -> None:
        """Append one step."""
        if self._csv is not None:
            for tag, value in values.items():
                _append(self._csv / f"{tag.replace('/', '_')}.csv", ("step", tag.rpartition("/")[2]), (samples, value))
        if self._events is not None:
            with self._events.open("ab") as out:
                out.write(tfevents.record(tfevents.scalar_event(time.time(), samples, values)))


def _append(path: Path, header: tuple[str, str], row: tuple[int, float]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        if fresh:
            out.writerow(header)
        out.writerow(row)
