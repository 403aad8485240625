"""ModelProcess: one run of the model's process, and the socketpair to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from . import wire

COMMAND = (sys.executable, "-P", "-m", "twofold.serve.worker")
READ_AHEAD = 4 * 1024 * 1024


class ModelProcess:
    """Made by `spawn`; `receive` until None, then `close`."""

    def __init__(self, popen: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._popen = popen
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, command: Sequence[str] = COMMAND) -> ModelProcess:
        """Start `command` with the number of its end of the socketpair as the last argument.

        The child looks for modules exactly where its parent does, and stands in its own process group, so that a
        Ctrl-C at the terminal reaches only the front, which lets running requests finish.
        """
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            popen = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours, limit=READ_AHEAD)
        return cls(popen, reader, writer)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def send(self, message: wire.ToWorker) -> None:
        """Queue one frame; a process that is gone shows in `receive`, not here."""
        if not self._writer.is_closing():
            self._writer.write(wire.pack(message))

    async def receive(self) -> wire.ToFront | None:
        """The next message, or None when the process has closed its end."""
        try:
            head = await self._reader.readexactly(wire.HEAD.size)
            return wire.for_front(await self._reader.readexactly(wire.length(head)))
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def kill(self, *, stacks: bool = True) -> None:
        """End it for certain; with `stacks` it may first leave every thread's stack on stderr."""
        if stacks:
            self._popen.send_signal(signal.SIGABRT)
            await asyncio.sleep(0.3)
        self._popen.kill()

    async def close(self, patience: float = 0.0) -> int:
        """Wait `patience` seconds for it to leave by itself, kill it otherwise; its exit code (below 0: a signal)."""
        self._writer.close()
        for _ in range(int(patience / 0.02)):
            if self._popen.poll() is not None:
                break
            await asyncio.sleep(0.02)
        else:
            self._popen.kill()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        return await asyncio.to_thread(self._popen.wait)
