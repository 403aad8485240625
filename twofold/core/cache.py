"""Where on disk Twofold keeps what it can make again: built kernels, unfolded files, packed weights."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import ConfigError


def cache_root() -> Path:
    """TWOFOLD_CACHE, or `twofold` in the system's cache folder of this user."""
    system = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TWOFOLD_CACHE") or os.path.join(system, "twofold"))


def cache_folder(name: str) -> Path:
    """The folder `name` in it, made when it is not there, that only this user can write to.

    Raises:
        ConfigError: it belongs to somebody else, or others may write to it.
    """
    folder = cache_root() / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"others may write to {folder}: chmod 700 it, or set TWOFOLD_CACHE to a folder of yours")
    return folder
