"""A reward's own process: reads its config and then batches from one socket; whatever it prints goes elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from ...core import TwofoldError, build
from . import wire
from .config import RewardConfig
from .function import one_line
from .scorers import build_scorer


def main() -> None:
    """Serve the socket whose number is the last argument until the panel closes it."""
    threading.Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()
    with socket.socket(fileno=int(sys.argv[-1])) as link:
        try:
            score = build_scorer(build(RewardConfig, wire.receive(link, dict)))
        except (Exception, SystemExit) as error:  # a user's file may raise anything when it is imported
            said = str(error) if isinstance(error, TwofoldError) else one_line(error)
            wire.send(link, wire.encode(wire.Ready(error=said)))
            return
        wire.send(link, wire.encode(wire.Ready()))
        while True:
            try:
                batch = wire.receive(link, wire.Batch)
            except wire.Broken:
                return
            try:
                scored = score(batch)
            except wire.Broken as broken:
                scored = _lost(batch, broken.reason, str(broken))
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                scored = _lost(batch, "raised", "raised " + one_line(error))
            try:
                frame = wire.encode(scored)
            except wire.Broken as broken:
                frame = wire.encode(_lost(batch, broken.reason, str(broken)))
            wire.send(link, frame)


def _lost(batch: wire.Batch, reason: str, note: str) -> wire.Scored:
    return wire.Scored([None] * len(batch), [wire.Fault(reason, len(batch), note)])


def _outlive_nobody(parent: int) -> None:
    """A trainer that was killed leaves no reward at work behind it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
