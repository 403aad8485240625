"""The files that a candidate may see, by Landlock: Python's own to read, its working folder to write, no other.

It takes no privilege. Newer kernels also keep its signals and its TCP connections inside.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import sysconfig
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
_FILE = _READ_FILE | _WRITE_FILE | 1 << 0 | 1 << 14  # execute, write, read, truncate: all that suits a single file
_PATH = getattr(os, "O_PATH", 0)


def readable() -> list[str]:
    """Where Python and the libraries it loads lie."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    places |= {str(Path(sys.base_prefix) / "lib"), str(Path(sys.base_exec_prefix) / "lib"), "/usr/share/zoneinfo"}
    places |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"}
    return sorted(place for place in places if os.path.exists(place))


def restrict(libc: ctypes.CDLL, folder: str) -> bool:
    """Confine this process to `readable` and to `folder`, for good; False where the kernel has no Landlock."""
    version = int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1))
    if version < 1:
        return False
    rights = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    rules = struct.pack("=QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = rules[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = int(libc.syscall(_CREATE, rules, ctypes.c_size_t(len(rules)), 0))
    if ruleset < 0:
        return False
    allowed = dict.fromkeys(readable(), _READ_FILE | _READ_DIR)
    allowed |= {"/dev/null": _READ_FILE | _WRITE_FILE, folder: rights & ~1}
    for place, right in allowed.items():
        right &= rights if os.path.isdir(place) else rights & _FILE
        handle = os.open(place, _PATH | os.O_CLOEXEC)
        libc.syscall(_ADD, ruleset, 1, struct.pack("=Qi", right, handle), 0)
        os.close(handle)
    held = bool(libc.syscall(_RESTRICT, ruleset, 0) == 0)
    os.close(ruleset)
    return held
