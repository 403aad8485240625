"""Stream: a decoder whose layers pass through a few buffers, read ahead from a file while others are computed.

    file      | layer 0 | layer 1 | layer 2 | layer 3 | ...            sections.py; past the system's cache
    readers   |  2 → a  |  3 → b  |  4 → a  |  5 → b  | ...  | 0 → a  | 1 → b     after the last layer comes the first
    compute        | 1 in b  | 2 in a  | 3 in b  | ...                            of the next step

A layer has one buffer for good, shared with others, so a compiled program, which holds addresses, is written once. As
many layers as the budget allows stay in memory; they lie evenly between the others, and give the readers time. Every
token of a step shares one pass over the file, so a large batch is what makes this fast (ZeRO-Inference, Aminabadi et
al. 2022; FlexGen, Sheng et al. 2023). All of it is about where numbers lie: the same kernels read the same numbers.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from ..core.errors import CapacityError, ConfigError, TwofoldError
from ..platforms.direct import Direct, room
from .decoder import Decoder
from .sections import Section

BUFFERS = 2
READERS = 2
PIECE = 8 << 20


class StreamError(TwofoldError):
    """A layer's weights could not be read; whoever needs them is told, and the next step tries again."""


def refuse_new_weights(decoder: Decoder) -> None:
    """Raises ConfigError for a decoder whose layers come from a file, where they cannot be replaced."""
    if decoder.stream is not None:
        raise ConfigError("weights that are streamed cannot be replaced while they are served: start without streaming")


def in_memory(decoder: Decoder, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A decoder's tensors by name, each while its layer's weights are there.

    Raises:
        StreamError: they could not be read.
    """
    for layer, group in groupby(named, _layer_of):
        with decoder.stream.layer(layer) if decoder.stream is not None else nullcontext():
            yield from group


def _layer_of(named: tuple[str, Tensor]) -> int:
    first, *rest = named[0].split(".")
    return int(rest[0]) if first == "layers" else -1


def least_bytes(found: list[Section]) -> int:
    """What layers take at least: the buffers, or all of them where that is less."""
    sizes = [section.nbytes for section in found[1:]]
    return min(BUFFERS * max(sizes, default=0), sum(sizes))


def kept_layers(found: list[Section], budget: int) -> frozenset[int]:
    """The layers that stay in memory when layers and buffers may take `budget` bytes.

    Raises:
        CapacityError: it does not hold the buffers.
    """
    sizes = [section.nbytes for section in found[1:]]
    if sum(sizes) <= budget:
        return frozenset(range(len(sizes)))
    if budget < least_bytes(found):
        raise CapacityError(
            f"weights_memory_bytes is {budget}: {BUFFERS} layers at once need {least_bytes(found)}; raise it to that"
        )
    left = len(sizes) - min(len(sizes) - 1, (budget - least_bytes(found)) // max(sizes))
    passing = {number * len(sizes) // left for number in range(left)}
    return frozenset(range(len(sizes))) - passing


def held_bytes(found: list[Section], budget: int) -> int:
    """What weights take in memory under a budget for the layers."""
    kept, sizes = kept_layers(found, budget), [section.nbytes for section in found[1:]]
    buffers = 0 if len(kept) == len(sizes) else least_bytes(found)
    return found[0].nbytes + buffers + sum(sizes[number] for number in kept)


class Stream:
    """Gives the layers of a decoder their memory, and reads those that do not stay in it.

    `with stream.layer(i):` the weights of layer i are there; layers are run in order, over and over. Not for use by
    several threads at once.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, decoder: Decoder, file: Direct, found: list[Section], kept: frozenset[int]) -> None:
        self.file, self.kept = file, kept
        front, layers = found[0], found[1:]
        passing = [number for number in range(len(layers)) if number not in kept]
        self._turns = {number: turn for turn, number in enumerate(passing)}
        size = max((layers[number].nbytes for number in passing), default=0)
        rooms = [room(size) for _ in range(min(BUFFERS, len(passing)))]
        for number, section in ((-1, front), *enumerate(layers)):
            if number in self._turns:
                section.put(decoder, rooms[self._turns[number] % len(rooms)])
            else:
                raw = room(section.nbytes)
                file.read(section.begin, raw.numpy().data)
                section.put(decoder, raw)
        for number, layer in enumerate(decoder.layers):  # a decoder that is not compiled runs its layers as modules
            layer.register_forward_pre_hook(partial(self._enters, number))
            layer.register_forward_hook(partial(self._leaves, number))
        self.readers = Readers(file, [layers[number] for number in passing], rooms)
        self._end = weakref.finalize(self, self.readers.stop)

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """The weights of a layer are there until the end of the block.

        Raises:
            StreamError: they could not be read.
        """
        self.enter(number)
        try:
            yield
        finally:
            self.leave(number)

    def enter(self, number: int) -> None:
        """Wait for a layer's weights."""
        if number in self._turns:
            try:
                self.readers.take(self._turns[number])
            except OSError as error:
                raise StreamError(
                    f"layer {number} of the weights could not be read from {self.file.path}: {error.strerror or error}"
                ) from None

    def leave(self, number: int) -> None:
        """Its buffer may be filled with another's."""
        if number in self._turns:
            self.readers.give_back()

    def close(self) -> None:
        """Read no more."""
        self._end()

    def _enters(self, number: int, layer: nn.Module, args: Any) -> None:
        self.enter(number)

    def _leaves(self, number: int, layer: nn.Module, args: Any, out: Any) -> None:
        self.leave(number)


class _Job:
    """One section on its way into a buffer, in pieces that several threads read."""

    def __init__(self, turn: int, size: int) -> None:
        self.turn = turn
        self.begins = iter(range(0, size, PIECE))
        self.missing = -(-size // PIECE)
        self.error: OSError | None = None


class Readers:
    """Threads that fill buffers with sections in their turn, over and over, as far ahead as buffers are free.

    Section t goes to buffer t mod len(rooms). `read_bytes` and `waited_seconds` count since the start.
    """

    def __init__(self, file: Direct, sections: Sequence[Section], rooms: Sequence[Tensor]) -> None:
        self.read_bytes, self.waited_seconds = 0, 0.0
        self._file, self._sections = file, sections
        self._rooms = [raw.numpy().data for raw in rooms]
        self._holds: list[int | None] = [None] * len(rooms)
        self._jobs: list[_Job | None] = [None] * len(rooms)
        self._failed: dict[int, OSError] = {}
        self._next, self._using = 0, -1
        self._stopped = not sections
        self._changed = threading.Condition()
        for number in range(READERS if sections else 0):
            threading.Thread(target=self._work, name=f"weights-{number}", daemon=True).start()

    def take(self, turn: int) -> None:
        """Wait until a section is in its buffer, which is kept until `give_back`. Raises OSError: it cannot be read."""
        buffer, began = turn % len(self._rooms), time.perf_counter()
        with self._changed:
            self._next, self._using = turn, -1
            self._changed.notify_all()
            while self._holds[buffer] != turn and turn not in self._failed:
                self._changed.wait()
            self.waited_seconds += time.perf_counter() - began
            if turn in self._failed:
                raise self._failed.pop(turn)
            self._next, self._using = (turn + 1) % len(self._sections), buffer
            self._changed.notify_all()

    def give_back(self) -> None:
        """The buffer of the last section taken is free."""
        with self._changed:
            self._using = -1
            self._changed.notify_all()

    def stop(self) -> None:
        """Read no more; a piece that is being read is read to its end."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (piece := self._piece()) is not None:
            job, at, buffer = piece
            section = self._sections[job.turn]
            size = min(PIECE, section.nbytes - at)
            error: OSError | None = None
            try:
                self._file.read(section.begin + at, self._rooms[buffer][at : at + size])
            except OSError as failure:
                error = failure
            with self._changed:
                self.read_bytes += size
                job.error = job.error or error
                job.missing -= 1
                if not job.missing:
                    self._close(job, buffer)

    def _close(self, job: _Job, buffer: int) -> None:
        self._jobs[buffer] = None
        if job.error is None:
            self._holds[buffer] = job.turn
        else:
            self._failed[job.turn] = job.error
        self._changed.notify_all()

    def _piece(self) -> tuple[_Job, int, int] | None:
        """The next piece to read: its section, where it begins there, and the buffer; None at the end."""
        with self._changed:
            while not self._stopped:
                for buffer, job in self._coming():
                    at = next(job.begins, None)
                    if at is not None:
                        return job, at, buffer
                self._changed.wait()
        return None

    def _coming(self) -> Iterator[tuple[int, _Job]]:
        """Sections on their way, the one that is needed first before others; begun where a buffer is free for it."""
        claimed: set[int] = set()
        for ahead in range(len(self._sections)):
            turn = (self._next + ahead) % len(self._sections)
            buffer = turn % len(self._rooms)
            if buffer in claimed:
                continue
            claimed.add(buffer)
            free = self._jobs[buffer] is None and buffer != self._using
            if free and self._holds[buffer] != turn and turn not in self._failed:
                self._holds[buffer] = None
                self._jobs[buffer] = _Job(turn, self._sections[turn].nbytes)
            if (job := self._jobs[buffer]) is not None:
                yield buffer, job
            if len(claimed) == len(self._rooms):
                return
