"""Random numbers by name: each tensor a function of (seed, its name), whatever order they are drawn in."""

from __future__ import annotations

import hashlib

import torch


def source(seed: int, name: str) -> torch.Generator:
    """Where the first value of the tensor called `name` comes from."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
