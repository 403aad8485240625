"""A judge: forks the candidate off before anything secret is read, then runs the tests in its own process.

    usher (this file's `main`, warm) ──fork──▶ judge ──fork──▶ candidate
      waits on the socket, reads nothing       reads the job   never has the socket

The usher is started once and forks a judge for each job that arrives. A verdict is a frame on the same socket:
{"passed": 3, "tests": 4, "why": "", "walls": [...]}, or {"fault": "...", "reason": "tests"} when the tests themselves
are at fault, or {"fault": "...", "reason": "court"} when no candidate could be started.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from typing import Any

from . import candidate, cases, walls
from .remote import Gone, Link, Remote

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
    """Usher: one judge after another for the jobs on descriptor 0; seconds, megabytes, folder on the command line."""
    seconds, megabytes, folder = float(sys.argv[-3]), int(sys.argv[-2]), sys.argv[-1]
    walls.hide()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    with socket.socket(fileno=0) as bench:
        while bench.recv(1, socket.MSG_PEEK):
            child = os.fork()
            if child == 0:
                try:
                    _sit(bench, walls.Limits(seconds, megabytes, folder))
                finally:
                    os._exit(1)
            if os.waitpid(child, 0)[1] != 0:
                _send(bench, {"why": "its tests broke the judge"})


def _sit(bench: socket.socket, limits: walls.Limits) -> None:
    """One job, from the empty socket to the verdict; never returns."""
    walls.die_with_parent()
    try:
        place = tempfile.mkdtemp(dir=limits.folder)
        ours, theirs = socket.socketpair()
        child = os.fork()
    except OSError as error:
        _send(bench, {"fault": f"cannot start a candidate: {error}", "reason": "court"})
        os._exit(0)
    if child == 0:
        try:
            candidate.live(theirs, limits._replace(folder=place))
        finally:
            os._exit(1)
    theirs.close()
    resource.setrlimit(resource.RLIMIT_AS, (_OWN_MEGABYTES << 20, _OWN_MEGABYTES << 20))
    try:
        verdict = judge(_read(bench), Link(ours, time.monotonic() + limits.seconds))
    finally:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        shutil.rmtree(place, ignore_errors=True)
    _send(bench, verdict)
    os._exit(0)


def _read(bench: socket.socket) -> dict[str, Any]:
    """A frame: four bytes of length, then JSON."""
    (size,) = struct.unpack(">I", bench.recv(4, socket.MSG_WAITALL))
    job: dict[str, Any] = json.loads(bench.recv(size, socket.MSG_WAITALL))
    return job


def _send(bench: socket.socket, verdict: dict[str, Any]) -> None:
    body = json.dumps(verdict).encode()
    bench.sendall(struct.pack(">I", len(body)) + body)


def judge(job: dict[str, Any], link: Link) -> dict[str, Any]:
    """The verdict on one candidate."""
    passed: set[int] = set()
    why = ""
    try:
        source, count = cases.arrange(job["tests"], job["entry"])
        used = cases.names(source, job["entry"])
    except ValueError as error:
        return {"fault": str(error), "reason": "tests"}
    try:
        stand = link.hear()["walls"]
    except Gone:
        return {"fault": f"cannot start a candidate: it {link.gone} behind its walls", "reason": "court"}
    try:
        link.say({"run": job["code"]})
        found = link.names()
        absent = sorted(name for name in used.asked - found.keys() if hasattr(builtins, name))
        if absent:  # Python's own shall not do it for the candidate
            return {"passed": 0, "tests": count, "why": f"defines no '{absent[0]}'", "walls": stand}
        sys.modules[cases.SOLUTION] = _solution(found)
        loader = candidate.Source(source)
        module = loader.module("tests")
        space = _visible(found, used, job["entry"])
        link.kinds = tuple(space[name] for name in sorted(used.kinds & space.keys()) if type(space[name]) is Remote)
        vars(module).update(space)
        vars(module)[cases.CASE] = lambda number: _Case(link, passed, number)
        loader.exec_module(module)
    except Gone:
        why = link.gone
    except BaseException as error:  # the candidate's own module, or the set-up between the tests
        why = f"{type(error).__name__}: {error}"[:200]
    return {"passed": len(passed), "tests": count, "why": why or link.gone, "walls": stand}


def _visible(found: dict[str, Any], used: cases.Names, entry: str | None) -> dict[str, Any]:
    """A candidate's `len` or `math` does not stand in for the real one, unless it is what was asked for."""
    space: dict[str, Any] = {name: importlib.import_module(name) for name in used.modules}
    space |= {name: thing for name, thing in found.items() if not _pythons(name) or name in used.asked}
    if entry in found:
        space[cases.ENTRY] = found[entry]
    return space


def _solution(found: dict[str, Any]) -> types.ModuleType:
    """The candidate as a module to import from: all by name, with `*` what hides nothing of Python's."""
    made = types.ModuleType(cases.SOLUTION)
    vars(made).update(found, __all__=[name for name in found if not _pythons(name)])
    return made


def _pythons(name: str) -> bool:
    return hasattr(builtins, name) or name in sys.stdlib_module_names
