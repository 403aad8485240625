"""Stopping a run by signal: once asks for a clean end after the step, twice ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Stop:
    """While entered, the first SIGINT or SIGTERM sets `asked`; the second ends the process with status 128 + signal.

    Outside the main thread, where Python allows no handlers, it only holds `asked`.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
