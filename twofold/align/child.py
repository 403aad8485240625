"""Child: a generator's process as its trainer sees it: frames in and out, signs of life, and its last words."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ..core import TwofoldError, WorkerError
from ..platforms import bound_spin, bound_team
from . import wire
from .remote_config import RemoteConfig

MODULE = "twofold.align.generator"
LAST_WORDS = 60
"""Lines of standard error that are told when it dies."""


class Child:
    """Started at once. `hear` gets each message, in a thread; `lost` is told once, when nothing more will come."""

    def __init__(
        self,
        config: RemoteConfig,
        hear: Callable[[wire.ToTrainer], None],
        lost: Callable[[str], None],
        files: Sequence[int] = (),
    ) -> None:
        self._config, self._hear, self._lost = config, hear, lost
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        self._patience = config.start_limit
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        if config.threads:
            environment["OMP_NUM_THREADS"] = str(config.threads)
        bound_spin(environment)
        bound_team(environment)
        command = [*config.launcher, config.python or sys.executable, "-P", "-m", MODULE]
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    pass_fds=files,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                self._socket.close()
                raise WorkerError(f"the generator cannot be started: {command[0]}: {error.strerror}") from None
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        self._fatal = ""
        self._closing = False
        self._relay = threading.Thread(target=self._relay_words, name="generator-words", daemon=True)
        self._relay.start()
        self._limit(config.start_limit)
        self._ears = threading.Thread(target=self._listen, name="generator-ears", daemon=True)
        self._ears.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, message: wire.ToGenerator) -> None:
        """Say something; that it is gone is told by `lost`, not here."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(wire.pack(message))

    def kill(self) -> None:
        """End it for certain."""
        self._popen.kill()

    def close(self, patience: float = 5.0) -> None:
        """Ask it to leave, and see that it does."""
        self._closing = True
        self.send(wire.Stop())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(patience)
        self._popen.kill()
        self._popen.wait()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._ears:
            self._ears.join(patience)
        self._relay.join(1.0)
        self._socket.close()

    # ------------------------------------------------------------------------------------ its threads
    def _limit(self, seconds: float) -> None:
        self._patience = seconds
        whole = int(seconds)
        limit = struct.pack("ll", whole, int((seconds - whole) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def _listen(self) -> None:
        why = ""
        try:
            while True:
                message = wire.for_trainer(wire.receive(self._socket.recv))
                if isinstance(message, wire.Beat):
                    if message.step_seconds > self._config.step_limit:
                        why = f"one step took more than step_limit, {self._config.step_limit:g} s"
                        break
                    continue
                if isinstance(message, wire.Fatal):
                    self._fatal = message.message
                    continue
                if isinstance(message, wire.Ready):
                    self._limit(self._config.patience)
                self._hear(message)
        except BlockingIOError:
            why = f"it gave no sign of life for {self._patience:g} s"
        except (EOFError, OSError):
            pass
        except TwofoldError as error:
            why = str(error)
        if not self._closing:
            self._lost(self._obituary(why))

    def _obituary(self, why: str) -> str:
        """Why it is gone: its exit or ours, what it said itself, and the last of its standard error."""
        if why:
            self._popen.kill()
        try:
            code = self._popen.wait(2.0)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        self._relay.join(1.0)
        ended = why or (f"signal {-code}" if code < 0 else f"exit code {code}")
        words = "\n".join(self._words)
        told = f"the generator's process is gone ({ended})"
        told += f": {self._fatal}" if self._fatal else ""
        return told + (f"\nits last words:\n{words}" if words else "")

    def _relay_words(self) -> None:
        assert self._popen.stderr is not None
        with self._popen.stderr as words:
            for line in words:
                text = line.decode(errors="replace").rstrip("\n")
                self._words.append(text)
                print(text, file=sys.stderr, flush=True)
