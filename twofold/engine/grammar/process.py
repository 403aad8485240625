"""GrammarProcess: one run of the grammar process, and the socketpair to it; it waits only as long as it is told."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys

import msgspec

from . import messages as m

COMMAND = (sys.executable, "-P", "-m", "twofold.engine.grammar.child")
READ = 1 << 18
MODEST = 10  # of 19: a stranger's grammar takes no time from those who are served


class GrammarProcess:
    """Started at once; `opening` is what it is told first. A `modest` one gives way to whoever wants a processor."""

    def __init__(self, opening: m.Open, *, modest: bool = False) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with theirs:
            self._popen = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **threads, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "2"},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        if modest:
            os.setpriority(os.PRIO_PROCESS, self._popen.pid, MODEST)
        ours.setblocking(False)
        self._sock = ours
        self._out = bytearray()
        self._in = bytearray()
        self.send(opening)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Queue one frame; what does not fit the socket now leaves with the next call."""
        self._out += m.pack(message)
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # full, or gone, which shows in `receive`
            while self._out:
                del self._out[: self._sock.send(self._out)]

    def receive(self, seconds: float = 0.0) -> list[m.FromChild]:
        """What has been answered; waits for the first answer as long as told.

        Raises:
            EOFError: the process is gone.
            WorkerError: it said what is no message.
        """
        self._flush()
        found = self._messages()
        if found:
            return found
        if seconds > 0:
            select.select([self._sock], [self._sock] if self._out else [], [], seconds)
        try:
            while more := self._sock.recv(READ):
                self._in += more
                if len(more) < READ:
                    break
            else:
                raise EOFError
        except BlockingIOError:
            pass
        except OSError:
            raise EOFError from None
        return self._messages()

    def _messages(self) -> list[m.FromChild]:
        found: list[m.FromChild] = []
        at, head = 0, m.HEAD.size
        while len(self._in) - at >= head:
            size = m.length(bytes(self._in[at : at + head]))
            if len(self._in) - at - head < size:
                break
            found.append(m.from_child(bytes(self._in[at + head : at + head + size])))
            at += head + size
        del self._in[:at]
        return found

    def kill(self) -> None:
        """End it for certain."""
        self._sock.close()
        self._popen.kill()
        self._popen.wait()
