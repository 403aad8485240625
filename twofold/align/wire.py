"""What a trainer and its generator say to each other, and how it lies on the wire.

    trainer                                        generator
      │ Start ──────────────────────────────────────▶ │  builds an engine without weights
      │ ◀─────────────────────────────── Ready, Fatal │
      │ Offer(version), Filled(bucket) ... ─────────▶ │  into the spare decoder, while it steps with the other
      │ ◀─────────── Taken(slot) ..., Staged or Torn  │
      │ Swap(version) or Drop(version) ─────────────▶ │  between two steps
      │ ◀────────────────────────────────────── Swapped
      │ Submit, Abort, Rest, Ask ───────────────────▶ │
      │ ◀──────────────── Said, Rested, Told, Beat ...│
      │ Stop ───────────────────────────────────────▶ │  leaves

A frame is four bytes of length, little endian, then one msgpack value of a known type: no pickle, no code. Weights do
not come this way.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..engine.request import Output
from ..engine.stats import EngineStats
from ..engine.wire import Submit, pack, read, receive

__all__ = ["Submit", "pack", "receive"]  # of engine/wire.py, beside what is said here


class Start(msgspec.Struct, tag="start", frozen=True):
    """A model's config.json, the engine's settings as plain data, and where buckets of weights come from."""

    model: dict[str, Any]
    engine: dict[str, Any]
    dtype: str
    eos_ids: tuple[int, ...]
    bucket_bytes: int
    fingerprint: str
    """Of the buckets: both ends lay them out by themselves."""
    threads: int
    shared: tuple[int, int] | None
    """The number of a file of shared memory, and the bytes of each of its slots."""
    store: str | None
    """Where gloo meets: a file of this machine, or "host:port"."""
    patience: float


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """A sequence that nobody waits for any more; an unknown name is fine."""

    id: str


class Offer(msgspec.Struct, tag="offer", frozen=True):
    """Buckets of this version follow."""

    version: int


class Filled(msgspec.Struct, tag="filled", frozen=True):
    """A bucket is in `slot`, or comes through gloo now."""

    version: int
    number: int
    slot: int
    checksum: int


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """No more buckets of this version come, and it is not to be used."""

    version: int


class Swap(msgspec.Struct, tag="swap", frozen=True):
    """Go on with these weights from the next step on."""

    version: int


class Rest(msgspec.Struct, tag="rest", frozen=True):
    """Sleep, or wake."""

    asleep: bool


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """How is the engine?"""


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Leave, whatever is running."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine stands; what a request may be on it, in tokens."""

    max_model_len: int
    vocab: int
    cache_tokens: int


class Said(msgspec.Struct, tag="said", frozen=True):
    """What one step said."""

    outputs: list[Output]


class Taken(msgspec.Struct, tag="taken", frozen=True):
    """A slot may be filled again."""

    slot: int


class Staged(msgspec.Struct, tag="staged", frozen=True):
    """All weights of a version are there, and checked."""

    version: int


class Torn(msgspec.Struct, tag="torn", frozen=True):
    """They are not, and will not be used."""

    version: int
    why: str


class Swapped(msgspec.Struct, tag="swapped", frozen=True):
    """The engine goes on with these weights; `pause` seconds lay between two steps for it."""

    version: int
    pause: float


class Rested(msgspec.Struct, tag="rested", frozen=True):
    """The engine sleeps, or is awake."""

    asleep: bool


class Told(msgspec.Struct, tag="told", frozen=True):
    """How it is."""

    stats: EngineStats


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """The process is scheduled; `step_seconds` is how long the step that is now running has taken, 0 when idle."""

    step_seconds: float


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """Why the process is about to leave."""

    message: str


ToGenerator = Start | Submit | Abort | Offer | Filled | Drop | Swap | Rest | Ask | Stop
ToTrainer = Ready | Said | Taken | Staged | Torn | Swapped | Rested | Told | Beat | Fatal

_to_generator: msgspec.msgpack.Decoder[ToGenerator] = msgspec.msgpack.Decoder(ToGenerator)
_to_trainer: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)


def for_generator(body: bytes) -> ToGenerator:
    """Decode what the trainer sent; anything but a known message raises WorkerError."""
    return read(_to_generator, body, "trainer", "generator")


def for_trainer(body: bytes) -> ToTrainer:
    """Decode what the generator sent; anything but a known message raises WorkerError."""
    return read(_to_trainer, body, "generator", "trainer")
