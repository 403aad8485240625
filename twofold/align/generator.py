"""The generator's process: an engine with weights of its own, which steps on while new ones come.

    ears     reads the trainer's frames; the end of the stream ends the process, also in the middle of a step
    main     steps; takes requests and swaps decoders between two steps
    stager   puts arriving buckets into the spare decoder, checked
    pulse    beats four times a second

Two decoders, one at work and one to be filled: a swap changes which is which, and moves nothing. A transfer that ends
half-way leaves the spare one in pieces, and nobody ever steps with it.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from ..core import TwofoldError, WorkerError, build
from ..engine.request import Output, State
from . import wire

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.config import EngineConfig
    from ..engine.engine import Engine
    from ..models.decoder import Decoder
    from .buckets import Buckets
    from .channel import Inlet

BEAT_SECONDS = 0.25
Mail: TypeAlias = "queue.SimpleQueue[wire.Offer | wire.Filled | wire.Drop]"

NOTHING = -1
"""The version of an engine that no weights have come to."""


class Line:
    """The process's two ends of the conversation."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._lock = reading, writing, threading.Lock()

    def send(self, message: wire.ToTrainer) -> None:
        frame = memoryview(wire.pack(message))
        with self._lock:
            while frame:
                frame = frame[os.write(self._writing, frame) :]

    def receive(self) -> wire.ToGenerator:
        return wire.for_generator(wire.receive(partial(os.read, self._reading)))


class Stager:
    """Takes offers of weights, a bucket at a time, into `spare`; its own thread."""

    def __init__(self, line: Line, mail: Mail, buckets: Buckets, inlet: Inlet, spare: Decoder) -> None:
        self.spare = spare
        self._line, self._mail, self._buckets, self._inlet = line, mail, buckets, inlet

    def run(self) -> None:
        """For ever."""
        import torch

        torch.set_num_threads(1)  # of this thread: the others are for the steps
        while True:
            offer = self._mail.get()
            if isinstance(offer, wire.Offer):
                self._take(offer)
            elif isinstance(offer, wire.Filled):  # of an offer that was torn
                self._data(offer)
                self._line.send(wire.Taken(offer.slot))

    def _take(self, offer: wire.Offer) -> None:
        from ..models.weights import load_tensors

        try:
            load_tensors(self.spare, self._arriving(offer.version))
        except (TwofoldError, RuntimeError) as error:
            self._line.send(wire.Torn(offer.version, str(error)))
        else:
            self._line.send(wire.Staged(offer.version))

    def _arriving(self, version: int) -> Iterator[tuple[str, Tensor]]:
        from .buckets import checksum

        due = set(range(len(self._buckets)))
        while due:
            told = self._mail.get()
            if not isinstance(told, wire.Filled):
                raise WorkerError(f"version {version} ended {len(due)} of {len(self._buckets)} buckets too early")
            data = self._data(told)
            try:
                if told.version != version or told.number not in due:
                    raise WorkerError(f"bucket {told.number} of version {told.version} is not one that is due")
                if checksum(data) != told.checksum:
                    raise WorkerError(f"bucket {told.number} of {len(self._buckets)} arrived damaged")
                due.remove(told.number)
                yield from self._buckets.unpack(told.number, data)
            finally:
                self._line.send(wire.Taken(told.slot))

    def _data(self, told: wire.Filled) -> Tensor:
        return self._inlet.receive(told.slot, self._buckets.list[told.number].nbytes)


class Generator:
    """The step loop. Requests wait until there are weights."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.inbox: queue.SimpleQueue[wire.ToGenerator] = queue.SimpleQueue()
        self.step_began: float | None = None
        self._mail: Mail = queue.SimpleQueue()
        self._held: deque[wire.Submit] = deque()
        self._stager: Stager | None = None

    def run(self) -> int:
        """Build, then step until told to stop; the exit code of the process."""
        threading.Thread(target=self._ears, name="ears", daemon=True).start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()
        try:
            start = self.inbox.get()
            if isinstance(start, wire.Start):
                self._loop(self._build(start))
        except TwofoldError as error:
            self.line.send(wire.Fatal(f"{type(error).__name__}: {error}"))
            return 1
        except Exception as error:
            traceback.print_exc()
            self.line.send(wire.Fatal(f"{type(error).__name__}: {error}"))
            return 1
        return 0

    def _build(self, start: wire.Start) -> Engine:
        """An engine whose decoder has no weights yet, and the stager beside it."""
        import torch

        from ..engine.config import EngineConfig
        from ..engine.engine import Engine
        from ..models.decoder import Decoder
        from ..models.weights import decoder_tensors, spec_from
        from .buckets import Buckets
        from .channel import Pair, SharedInlet

        if start.threads:
            torch.set_num_threads(start.threads)
        spec, dtype = spec_from(start.model), getattr(torch, start.dtype)
        config = build(EngineConfig, start.engine, "engine.")
        layout = Buckets(decoder_tensors(Decoder(spec, dtype=dtype, device="meta")), start.bucket_bytes)
        if start.fingerprint != layout.fingerprint:
            raise WorkerError("the trainer lays its weights out otherwise: have the same Twofold at both ends")
        first, spare = (_empty(start, config) for _ in range(2))
        engine = Engine(first, config, eos_ids=start.eos_ids)
        engine.version = NOTHING
        limits = engine.limits
        self.line.send(wire.Ready(limits.max_model_len, limits.vocab, limits.cache_tokens))
        inlet = SharedInlet(*start.shared) if start.shared else Pair(start.store or "", 1, start.patience)
        self._stager = Stager(self.line, self._mail, layout, inlet, spare)
        threading.Thread(target=self._stager.run, name="stager", daemon=True).start()
        return engine

    # ------------------------------------------------------------------------------------ the loop
    def _loop(self, engine: Engine) -> None:
        while self._take(engine):
            if self._can_step(engine):
                self.step_began = time.monotonic()
                outputs = engine.step()
                self.step_began = None
                if outputs:
                    self.line.send(wire.Said(outputs))

    def _can_step(self, engine: Engine) -> bool:
        return engine.has_work and not engine.asleep and engine.version != NOTHING

    def _exchange(self, engine: Engine, version: int) -> None:
        assert self._stager is not None
        began = time.perf_counter()
        self._stager.spare = engine.exchange(self._stager.spare, version)
        self.line.send(wire.Swapped(version, time.perf_counter() - began))
        while self._held:
            self._submit(engine, self._held.popleft())

    def _take(self, engine: Engine) -> bool:
        """Apply what the trainer asked for; wait for it when there is nothing else to do. False means leave."""
        block = not self._can_step(engine)
        while True:
            try:
                message = self.inbox.get(block)
            except queue.Empty:
                return True
            block = False
            match message:
                case wire.Submit() if engine.version == NOTHING:
                    self._held.append(message)
                case wire.Submit():
                    self._submit(engine, message)
                case wire.Abort(id=name):
                    self._abort(engine, name)
                case wire.Swap(version=version):
                    self._exchange(engine, version)
                case wire.Rest(asleep=asleep):
                    (engine.sleep if asleep else engine.wake)()
                    self.line.send(wire.Rested(asleep))
                case wire.Ask():
                    self.line.send(wire.Told(engine.stats()))
                case wire.Stop():
                    return False

    def _submit(self, engine: Engine, message: wire.Submit) -> None:
        request = message.request()
        try:
            engine.submit(request)
        except TwofoldError as error:  # one bad request is its own affair
            self._end(engine, request.id, State.ERROR, str(error))

    def _abort(self, engine: Engine, name: str) -> None:
        held = [message for message in self._held if message.id == name]
        for message in held:
            self._held.remove(message)
            self._end(engine, name, State.ABORT)
        engine.abort(name)

    def _end(self, engine: Engine, name: str, state: State, error: str | None = None) -> None:
        self.line.send(wire.Said([Output(name, finish=state, error=error)]))

    # ------------------------------------------------------------------------------------ the other threads
    def _ears(self) -> None:
        try:
            while True:
                message = self.line.receive()
                if isinstance(message, wire.Offer | wire.Filled | wire.Drop):
                    self._mail.put(message)
                else:
                    self.inbox.put(message)
        except (OSError, EOFError):
            os._exit(0)  # the trainer is gone: nobody is left to tell
        except TwofoldError as error:
            print(f"twofold generator: {error}", file=sys.stderr, flush=True)
            os._exit(1)

    def _pulse(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            began = self.step_began
            try:
                self.line.send(wire.Beat(0.0 if began is None else time.monotonic() - began))
            except OSError:
                return


def _empty(start: wire.Start, config: EngineConfig) -> Decoder:
    """A decoder with memory and without weights, in the number format that the engine is to have."""
    import torch

    from ..models.decoder import Decoder
    from ..models.memory import give_memory
    from ..models.quantized import formats, prepare
    from ..models.weights import spec_from

    spec, dtype = spec_from(start.model), getattr(torch, start.dtype)
    decoder = Decoder(spec, dtype=dtype, device="meta", max_len=config.max_model_len)
    if config.quantization:
        prepare(decoder, formats(decoder, config.quantization))
    give_memory(decoder, config.device)
    return decoder


def main() -> NoReturn:
    """`python -m twofold.align.generator`: standard input and output are the trainer's; prints go to standard error."""
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    faulthandler.enable()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # they are the trainer's to answer
    code = Generator(Line(reading, writing)).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of math libraries may not be joined; the memory goes with the process


if __name__ == "__main__":
    main()
