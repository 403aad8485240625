"""What is said to the grammar process and back, in the frames of `engine/wire.py`.

engine or front                          grammar process
  │ Open ───────────────────────────────▶ │  reads the tokenizer
  │ ◀─────────────────────────────── Opened │
  │ Check, Validate ────────────────────▶ │  (front)
  │ ◀────────────────────────────── Checked │
  │ Begin, Advance, Along, End ─────────▶ │  (engine)
  │ ◀─────────────────────── Next, Masks  │
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..structured import StructuredOutputs
from ..wire import HEAD, length, pack, read, receive

__all__ = ["HEAD", "length", "pack", "receive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarLimits:
    """What one grammar may cost: seconds to compile and for one answer, and bytes for all of them together."""

    compile_seconds: float = 2.0
    mask_seconds: float = 1.0
    memory_bytes: int = 2 << 30


class Open(msgspec.Struct, tag="open", frozen=True):
    """The folder with the tokenizer, how many logits the model has, the ids that end a text, and the limits."""

    folder: str
    vocab: int
    eos_ids: tuple[int, ...]
    compile_seconds: float
    mask_seconds: float
    memory_bytes: int


class Check(msgspec.Struct, tag="check", frozen=True):
    """Does this compile, and can a text begin with it?"""

    id: int
    wanted: StructuredOutputs


class Validate(msgspec.Struct, tag="validate", frozen=True):
    """Is this finished text what the schema says?"""

    id: int
    wanted: StructuredOutputs
    text: str


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """A request and the tokens that it already has; answered by Next."""

    serial: int
    wanted: StructuredOutputs
    ids: tuple[int, ...]


class Advance(msgspec.Struct, tag="advance", frozen=True):
    """More tokens of a request; answered by Next."""

    serial: int
    ids: tuple[int, ...]


class Along(msgspec.Struct, tag="along", frozen=True):
    """What may come after each of these drafts; answered by Masks. The request stays where it is."""

    serial: int
    at: int
    drafts: tuple[int, ...]


class End(msgspec.Struct, tag="end", frozen=True):
    """Nobody asks about these any more."""

    serials: tuple[int, ...]


class Opened(msgspec.Struct, tag="opened", frozen=True):
    """The tokenizer is read, or why not."""

    error: str | None = None


class Checked(msgspec.Struct, tag="checked", frozen=True):
    """What is wrong with the form of a Check, or with the text of a Validate; None is a yes."""

    id: int
    error: str | None = None


class Next(msgspec.Struct, tag="next", frozen=True):
    """Where a request with `at` tokens stands: the tokens it must go on with, and what may come after these.

    An empty mask says that nothing may: the text is complete. `error` says why there is no more to be had.
    """

    serial: int
    at: int
    forced: tuple[int, ...] = ()
    mask: bytes = b""
    error: str | None = None


class Masks(msgspec.Struct, tag="masks", frozen=True):
    """What may come at `at` and after each draft, as far as the grammar allows the drafts; empty: nothing."""

    serial: int
    at: int
    drafts: tuple[int, ...]
    masks: tuple[bytes, ...]
    error: str | None = None


def opening(folder: str | Path, vocab: int, eos_ids: Sequence[int], limits: GrammarLimits | None = None) -> Open:
    """What a grammar process is told first."""
    limits = limits or GrammarLimits()
    return Open(
        folder=str(folder),
        vocab=vocab,
        eos_ids=tuple(eos_ids),
        compile_seconds=limits.compile_seconds,
        mask_seconds=limits.mask_seconds,
        memory_bytes=limits.memory_bytes,
    )


ToChild = Open | Check | Validate | Begin | Advance | Along | End
FromChild = Opened | Checked | Next | Masks

_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def for_child(body: bytes) -> ToChild:
    """Decode what the engine or the front sent; anything else raises WorkerError."""
    return read(_to_child, body, "engine", "grammar process")


def from_child(body: bytes) -> FromChild:
    """Decode what the grammar process sent; anything else raises WorkerError."""
    return read(_from_child, body, "grammar process", "engine")
