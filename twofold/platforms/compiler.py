"""The C++ compiler that kernels may be built with; Twofold runs without one, on its reference kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiler:
    path: str
    version: str


def find_compiler() -> Compiler | None:
    """The first of $CXX, g++, clang++ and c++ that answers, or None."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        lines = done.stdout.splitlines()
        return Compiler(path=path, version=lines[0] if lines else "unknown")
    return None
