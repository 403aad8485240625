"""What the front and the model's process say to each other, and how it lies on the wire.

    front                                   worker
      │ Start ────────────────────────────▶ │  loads the checkpoint
      │ ◀──────────────────── Ready | Fatal │
      │ Submit, Abort ────────────────────▶ │
      │ ◀──────────── Outputs, Stats, Beat  │
      │ Stop ─────────────────────────────▶ │  leaves

A frame is four bytes of length, little endian, then one msgpack value of a known type: no pickle, no code, and the
socket is an inherited pair without an address, so nobody else can speak.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from ..core import WorkerError
from ..engine.request import Output
from ..engine.sampling import SamplingParams
from ..engine.stats import EngineStats

HEAD = struct.Struct("<I")
MAX_FRAME = 256 * 1024 * 1024


class Start(msgspec.Struct, tag="start", frozen=True):
    """What to load, the engine's settings as plain data, and the ids that end a text."""

    model: str
    engine: dict[str, Any] = {}
    eos_ids: tuple[int, ...] = ()


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """One sequence, with the tokens it already has; the fields of `Request.wire()`."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sample: int
    priority: int
    salt: str
    adapter: str
    output_ids: list[int]
    seed: int
    seconds_left: float | None


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Sequences that nobody waits for any more; unknown names are fine."""

    ids: list[str]


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Leave, whatever is running."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded; what the front must know of it. `max_len` in tokens, prompt and output together."""

    max_len: int
    vocab_size: int
    max_running: int
    block_size: int
    blocks: int


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """What one step said, and which sequences it ran for the first time, with the seconds that each had waited."""

    outputs: list[Output]
    started: list[tuple[str, float]] = []


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


ToWorker = Start | Submit | Abort | Stop
ToFront = Ready | Outputs | Stats | Beat | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def pack(message: ToWorker | ToFront) -> bytes:
    """One frame, its length in front.

    Raises:
        WorkerError: the frame is larger than both sides agreed to read.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise WorkerError(f"a message of {len(body)} bytes is more than the {MAX_FRAME} a frame may have")
    return HEAD.pack(len(body)) + body


def length(head: bytes) -> int:
    """The size of the body that follows a frame's four bytes.

    Raises:
        WorkerError: no honest peer sends that much.
    """
    size: int = HEAD.unpack(head)[0]
    if size > MAX_FRAME:
        raise WorkerError(f"a frame of {size} bytes is announced, at most {MAX_FRAME} are read")
    return size


def for_worker(body: bytes) -> ToWorker:
    """Decode what the front sent; anything but a known message raises WorkerError."""
    try:
        return _to_worker.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WorkerError(f"the front sent what the worker cannot read: {error}") from None


def for_front(body: bytes) -> ToFront:
    """Decode what the worker sent; anything but a known message raises WorkerError."""
    try:
        return _to_front.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WorkerError(f"the worker sent what the front cannot read: {error}") from None
