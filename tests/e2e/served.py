"""A server as its users meet it: its own process, its own model process, a port of this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from twofold.core import build
from twofold.engine.config import EngineConfig
from twofold.serve.config import ServeConfig
from twofold.serve.server import serve
from twofold.serve.process import COMMAND
server, engine, command = json.loads(sys.argv[1])
sys.exit(serve(build(ServeConfig, server), build(EngineConfig, engine), command=command or COMMAND))
"""


def is_running(process: psutil.Process, module: str) -> bool:
    """Whether a process runs this module; one that has just ended does not."""
    try:
        return module in process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one too
        return False


class Served:
    """A running server. `log` is what it wrote to standard error, the model's process included."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        threading.Thread(target=self._read_log, daemon=True).start()
        self.url = self._find_url()
        self.host, port = self.url.removeprefix("http://").split(":")
        self.port = int(port)
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def _find_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"OpenAI API: (http://[^/]+)/v1", line):
                return found[1]
        raise AssertionError("the server did not start:\n" + "".join(self.log))

    @property
    def worker(self) -> psutil.Process:
        """The model's process; that of the grammars is not one."""
        children = [one for one in psutil.Process(self.process.pid).children() if one.status() != psutil.STATUS_ZOMBIE]
        (child,) = [one for one in children if not is_running(one, "twofold.engine.grammar.child")]
        return child

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/stats").json()
        return found

    def wait(self, so: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < deadline, "not so in time; the server says\n" + "".join(self.log[-30:])
            time.sleep(0.02)

    def idle(self) -> bool:
        """Whether nothing runs, nothing waits, and no block is in use."""
        now = self.stats()
        return not (now["running"] or now["waiting"] or now["requests"] or now["kv_blocks"]["used"])

    @contextmanager
    def still(self) -> Iterator[None]:
        """The model's process does nothing inside: no answer goes on or ends. Not for long, or it is replaced."""
        worker = self.worker
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()

    def stop(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def served(
    model: Path, *, engine: dict[str, Any] | None = None, command: list[str] | None = None, **server: Any
) -> Iterator[Served]:
    """Serve `model` on a free port with these fields of ServeConfig and EngineConfig; `command` is another engine."""
    settings = {"model": str(model), "port": 0, "served_model_name": "tiny", **server}
    dials = {"num_blocks": 256, "max_num_seqs": 32, "max_num_batched_tokens": 256, **(engine or {})}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps([settings, dials, command])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        yield (one := Served(process))
        one.stop()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
