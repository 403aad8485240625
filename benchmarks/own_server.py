"""A server of our own for a benchmark: `twofold serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MARK = "OpenAI API: "


@contextmanager
def own_server(model: str | None, flags: Sequence[str] = ()) -> Iterator[str]:
    """The server's address below which `/chat/completions` is; it is told to leave at the end."""
    command = [sys.executable, "-m", "twofold", "serve", *([model] if model else []), "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    yield line.removeprefix(MARK).split()[0]
                    break
            else:
                log.seek(0)
                raise SystemExit(f"the server did not start:\n{log.read()[-2000:]}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
