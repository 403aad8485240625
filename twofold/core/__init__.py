"""The words everyone uses; standard library only, no torch.

config.py    frozen dataclasses from TOML and flags, unknown keys refused with the nearest name
errors.py    the tree of errors, and how an unknown name is told
sparse.py    which blocks of keys a query sees: the layouts of block-sparse attention
registry.py  a name-to-thing table whose error lists the choices
cache.py     where on disk what can be made again is kept
"""

from .config import build, flatten, load_config, read_table
from .errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    RequestError,
    StateError,
    TwofoldError,
    WorkerError,
    nearest,
    unknown,
)
from .registry import Registry

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Registry",
    "RequestError",
    "StateError",
    "TwofoldError",
    "WorkerError",
    "build",
    "flatten",
    "load_config",
    "nearest",
    "read_table",
    "unknown",
]
