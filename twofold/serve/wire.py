"""What the front and the model's process say to each other, and how it lies on the wire.

    front                                   worker
      │ Start ────────────────────────────▶ │  loads the checkpoint
      │ ◀──────────────────── Ready | Fatal │
      │ Submit, Abort, Ask ───────────────▶ │
      │ ◀────── Outputs, Told, Stats, Beat  │
      │ Stop ─────────────────────────────▶ │  leaves

A frame is four bytes of length, little endian, then one msgpack value of a known type: no pickle, no code, and the
socket is an inherited pair without an address, so nobody else can speak.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..engine.request import Output
from ..engine.stats import EngineStats
from ..engine.vectors import Abilities
from ..engine.wire import HEAD, MAX_FRAME, Submit, length, pack, read, receive

__all__ = ["HEAD", "MAX_FRAME", "Submit", "length", "pack", "receive"]  # of engine/wire.py, beside what is said here


class Start(msgspec.Struct, tag="start", frozen=True):
    """What to load, the engine's settings as plain data, and the ids that end a text."""

    model: str
    engine: dict[str, Any] = {}
    eos_ids: tuple[int, ...] = ()


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Sequences that nobody waits for any more; unknown names are fine."""

    ids: list[str]


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """Anything else that is asked of the process: a verb that it knows, with plain data. Answered between two steps."""

    id: str
    verb: str
    what: dict[str, Any] = {}


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Leave, whatever is running."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded; what the front must know of it. `max_len` in tokens, prompt and output together."""

    max_len: int
    vocab_size: int
    max_running: int
    block_size: int
    blocks: int
    abilities: Abilities = Abilities()


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """What one step said, and which sequences it ran first, with the seconds that each had waited before it.

    `seconds` is how long the step took.
    """

    outputs: list[Output]
    started: list[tuple[str, float]] = []
    seconds: float = 0.0


class Told(msgspec.Struct, tag="told", frozen=True):
    """The answer to the Ask of that id; with `error`, `what["kind"]` is the error's name."""

    id: str
    error: str | None = None
    what: dict[str, Any] = {}


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """The engine's gauges and counters."""

    stats: EngineStats


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """The process is scheduled; `step_seconds` is how long the step that is now running has taken, 0 when idle."""

    step_seconds: float = 0.0


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """Why the process is about to leave; `kind` is the exception's name."""

    kind: str
    message: str


ToWorker = Start | Submit | Abort | Ask | Stop
ToFront = Ready | Outputs | Told | Stats | Beat | Fatal

_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def for_worker(body: bytes) -> ToWorker:
    """Decode what the front sent; anything but a known message raises WorkerError."""
    return read(_to_worker, body, "front", "worker")


def for_front(body: bytes) -> ToFront:
    """Decode what the worker sent; anything but a known message raises WorkerError."""
    return read(_to_front, body, "worker", "front")
