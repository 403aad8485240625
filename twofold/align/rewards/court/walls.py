"""What a candidate is held by, one wall behind the other; each that this machine lacks is named, never assumed.

limits      processor seconds, address space, size of a file, open files, no core dumps
namespaces  no network but an empty loopback, own IPC, a working folder of its own that can fill only itself
landlock    Python's files to read, the working folder to write, nothing else exists
seccomp     no sockets, processes, programs, signals, tracing
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from typing import NamedTuple

from . import landlock, seccomp

WALLS = ("namespaces", "landlock", "seccomp")
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_NET = 0x20000, 0x08000000, 0x10000000, 0x40000000
_PRIVATE, _NO_SUID, _NO_DEVICES, _NO_PROGRAMS = 0x44000, 2, 4, 8
_MEGABYTE = 1024 * 1024


class Limits(NamedTuple):
    """How much of the machine one candidate may have."""

    seconds: float
    """Wall clock, and processor time rounded up."""
    megabytes: int
    """Address space."""
    folder: str
    """Its working folder, empty at the start."""
    file_megabytes: int = 16
    files: int = 32
    processes: int = 16


def hide() -> None:
    """Keep this process's memory and descriptors from others of the same user."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def die_with_parent() -> None:
    """Be killed when the process that forked this one ends, however it ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG


def wall_in(limits: Limits) -> list[str]:
    """Raise every wall around this process, for good. Returns the names of those that stand."""
    os.chdir(limits.folder)
    _limit(limits)
    if not sys.platform.startswith("linux"):
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    stand = []
    user, group = os.geteuid(), os.getegid()
    libc.prctl(4, 1, 0, 0, 0)  # its maps are its own to write, which who forked it was not to be looked into
    if libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC | _NEW_MOUNTS) == 0:
        stand.append("namespaces")
        _same_names(user, group)
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))
        libc.mount(b"none", b"/", None, _PRIVATE, None)
        options = f"size={2 * limits.file_megabytes}m,nr_inodes=1000,mode=0700".encode()
        flags = _NO_SUID | _NO_DEVICES | _NO_PROGRAMS
        if libc.mount(b"none", os.fsencode(limits.folder), b"tmpfs", flags, options) == 0:
            os.chdir(limits.folder)
    die_with_parent()
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if landlock.restrict(libc, limits.folder):
        stand.append("landlock")
    header = ctypes.create_string_buffer(bytes.fromhex("22052019") + bytes(4), 8)  # version 3, this thread
    libc.capset(header, ctypes.create_string_buffer(24))
    if seccomp.install(libc):
        stand.append("seccomp")
    elif "namespaces" not in stand:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))
    return stand


def _same_names(user: int, group: int) -> None:
    """In its own user namespace a process is nobody, who may not make files, until its number stands in the map."""
    with contextlib.suppress(OSError):
        for name, text in (("setgroups", "deny"), ("gid_map", f"{group} {group} 1"), ("uid_map", f"{user} {user} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _limit(limits: Limits) -> None:
    processor = int(limits.seconds) + 1
    wanted = {
        resource.RLIMIT_CPU: processor,
        resource.RLIMIT_AS: limits.megabytes * _MEGABYTE,
        resource.RLIMIT_FSIZE: limits.file_megabytes * _MEGABYTE,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in wanted.items():
        with contextlib.suppress(ValueError, OSError):  # already lower, or a system that has no such limit
            resource.setrlimit(what, (most, most))
