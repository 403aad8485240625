"""One process for one completion: the candidate is forked off before anything secret is read, then the tests run here.

The verdict is one line of JSON on standard output: {"passed": 3, "tests": 4, "why": "", "walls": [...]}, or
{"fault": "..."} when the tests themselves are at fault. Only this process has that pipe.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from . import candidate, cases, walls
from .remote import Gone, Link

_OWN_MEGABYTES = 1024


class _Case:
    """The fence around one test: notes whether it ended well, swallows whatever it raised."""

    def __init__(self, link: Link, passed: set[int], number: int) -> None:
        self._link, self._passed, self._number = link, passed, number

    def __enter__(self) -> None:
        if self._link.gone:
            raise Gone

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if kind is None and not self._link.gone and self._number >= 0:
            self._passed.add(self._number)
        return not self._link.gone


def main() -> None:
    """Judge the job on standard input under the limits of the command line: seconds, megabytes, folder."""
    seconds, megabytes, folder = float(sys.argv[-3]), int(sys.argv[-2]), sys.argv[-1]
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        try:
            candidate.live(theirs, walls.Limits(seconds=seconds, megabytes=megabytes, folder=folder))
        finally:
            os._exit(1)
    theirs.close()
    walls.hide()
    verdict_to = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_OWN_MEGABYTES << 20, _OWN_MEGABYTES << 20))
    try:
        verdict = judge(json.loads(sys.stdin.buffer.read()), Link(ours, time.monotonic() + seconds))
    finally:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os.write(verdict_to, json.dumps(verdict).encode())
    os._exit(0)


def judge(job: dict[str, Any], link: Link) -> dict[str, Any]:
    """The verdict on one candidate."""
    passed: set[int] = set()
    why, stand, count = "", [], 1
    try:
        source, count = cases.arrange(job["tests"], job["entry"])
    except ValueError as error:
        return {"fault": str(error)}
    try:
        stand = link.hear()["walls"]
        link.say({"run": job["code"]})
        space = _visible(link.names(link.hear()), job["entry"])
        loader = candidate.Source(source)
        module = loader.module("tests")
        vars(module).update(space)
        vars(module)[cases.CASE] = lambda number: _Case(link, passed, number)
        loader.exec_module(module)
    except Gone:
        why = link.gone
    except BaseException as error:  # the candidate's own module, or the set-up between the tests
        why = f"{type(error).__name__}: {error}"[:200]
    return {"passed": len(passed), "tests": count, "why": why or link.gone, "walls": stand}


def _visible(names: dict[str, Any], entry: str | None) -> dict[str, Any]:
    """A candidate's `len` or `math` does not stand in for the real one, unless it is what was asked for."""
    return {
        name: thing
        for name, thing in names.items()
        if name == entry or not (hasattr(builtins, name) or name in sys.stdlib_module_names or name.startswith("__"))
    }
