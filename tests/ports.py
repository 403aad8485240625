"""Ports for processes that meet on this machine."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Below those that Linux gives to whoever asks for any, which another test's connections may take in the meantime."""


def free_port() -> int:
    """A port of this machine that nobody listens on, and that nobody is given by chance."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as taken:
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"a hundred ports of {PORTS} are taken")
