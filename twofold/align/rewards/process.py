"""One reward's process as the panel sees it: started when first asked, killed at its time limit, started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import asdict
from typing import IO

from . import wire
from .config import RewardConfig
from .passes import batch_seconds

_COMMAND = (sys.executable, "-P", "-m", "twofold.align.rewards.worker")
_KEPT = 20  # last lines of what it printed


class RewardProcess:
    """Not for two threads at once."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._popen: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._printed: deque[str] = deque(maxlen=_KEPT)
        self._reader: threading.Thread | None = None
        self._limit = config.timeout
        self._folder = ""
        """Where courts have their folders: here, so that they go with a process that was killed, too."""

    @property
    def pid(self) -> int | None:
        """Its process number, while it lives."""
        return self._popen.pid if self._popen is not None and self._popen.poll() is None else None

    def ask(self, frame: bytes, count: int) -> wire.Scored:
        """Its judgement of the batch in `frame`. Raises Broken after which the next call starts a new process."""
        try:
            link = self._link or self._start()
            tests = self.config.kind == "python_passes_tests"
            self._limit = batch_seconds(self.config, count) if tests else self.config.timeout
            deadline = time.monotonic() + self._limit
            wire.send(link, frame, deadline)
            scored = wire.receive(link, wire.Scored, deadline)
            if len(scored.values) != count:
                raise wire.Broken("count", f"returned {len(scored.values)} values for {count} completions")
            return scored
        except wire.Broken as broken:
            code = self.kill()
            raise self._explained(broken, code) from None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._printed.clear()
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if self.config.kind == "python_passes_tests":
            environment["TMPDIR"] = self._folder = tempfile.mkdtemp(prefix="twofold-courts-")
        with theirs:
            self._popen = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert self._popen.stdout is not None
        self._reader = threading.Thread(target=self._listen, args=(self._popen.stdout,), daemon=True)
        self._reader.start()
        self._link = ours
        self._limit = self.config.start
        deadline = time.monotonic() + self._limit
        wire.send(ours, wire.encode(asdict(self.config)), deadline)
        ready = wire.receive(ours, wire.Ready, deadline)
        if ready.error:
            raise wire.Broken("start", f"cannot start: {ready.error}")
        return ours

    def _listen(self, printed: IO[bytes]) -> None:
        """Keep the last lines of what it prints, long ones cut; a flood is read and forgotten."""
        with printed:
            while line := printed.readline(4096):
                self._printed.append(line.decode(errors="replace").rstrip())

    def _explained(self, broken: wire.Broken, code: int | None) -> wire.Broken:
        """What a person needs to know of a process that is gone: how it ended and what it said last."""
        if broken.reason == "timeout":
            return wire.Broken("timeout", f"{broken}: killed after {self._limit:g} s")
        if broken.reason != "died":
            return broken
        ending = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        lines = [line for line in self._printed if line.strip()][-3:]
        said = f", its last words: {' | '.join(lines)[-300:]}" if lines else ""
        return wire.Broken("died", f"died ({ending}){said}")

    def kill(self, patience: float = 0.2) -> int | None:
        """Hang up, give it `patience` seconds to leave by itself, end it and all it started.

        Returns its exit status: below 0 is a signal.
        """
        popen, self._popen = self._popen, None
        if self._link is not None:
            self._link.close()
            self._link = None
        if popen is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(patience)  # one that has died by itself says how
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        code = popen.wait()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""
        if self._reader is not None:
            self._reader.join(1.0)
        return code
