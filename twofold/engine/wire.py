"""How an engine in a process of its own is spoken to: frames, and the one message that every such process knows.

A frame is four bytes of length, little endian, then one msgpack value of a known type: no pickle, no code.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from ..core import WorkerError
from .request import Request
from .sampling import SamplingParams
from .vectors import Pooling

M = TypeVar("M")

HEAD = struct.Struct("<I")
MAX_FRAME = 256 << 20

_encoder = msgspec.msgpack.Encoder()


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
    pooling: Pooling | None = None
    types: tuple[int, ...] = ()

    def request(self) -> Request:
        """The sequence as this process's engine takes it."""
        left = self.seconds_left
        return Request(
            id=self.id,
            prompt_ids=self.prompt_ids,
            params=self.params,
            sample=self.sample,
            priority=self.priority,
            salt=self.salt,
            adapter=self.adapter,
            output_ids=self.output_ids,
            seed=self.seed,
            pooling=self.pooling,
            types=self.types,
            deadline=None if left is None else time.monotonic() + left,
        )


def pack(message: msgspec.Struct) -> bytes:
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


def receive(some: Callable[[int], bytes]) -> bytes:
    """Wait for the body of the next frame from `some`, which gives at most so many bytes, as `socket.recv` does.

    Raises:
        EOFError: the other end is gone.
        WorkerError: no honest peer sends that much.
    """

    def exactly(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            more = some(count - len(parts))
            if not more:
                raise EOFError
            parts += more
        return bytes(parts)

    return exactly(length(exactly(HEAD.size)))


def read(decoder: msgspec.msgpack.Decoder[M], body: bytes, sender: str, reader: str) -> M:
    """Decode a frame's body; anything but a known message raises WorkerError, which names both ends."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WorkerError(f"the {sender} sent what the {reader} cannot read: {error}") from None
