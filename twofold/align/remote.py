"""RemoteEngine: an engine with weights of its own in a child process, by the same five verbs.

    engine.submit(request); engine.abort(id); engine.step()
    engine.load_weights(named_tensors, version); engine.sleep() / engine.wake()

It generates on while the trainer works: `step` takes what one step of it said, and waits where there is nothing yet.
New weights travel in buckets into a second decoder while it steps with the first; between two steps they change
places. Running requests are then computed anew with the new weights, as `Engine.load_weights` does it, and their tokens
say which version made them. Whoever wants them to end with the weights they began with stages first and swaps later.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..core import ConfigError, RequestError, StateError, WorkerError
from ..engine.config import EngineConfig
from ..engine.limits import Limits
from ..engine.request import Output, Request, State
from ..engine.stats import EngineStats
from ..models.decoder import Decoder
from ..models.weights import decoder_tensors, spec_from
from . import wire
from .buckets import Buckets, checksum
from .channel import TRAINER, Meeting, Pair, Ring
from .child import Child
from .remote_config import RemoteConfig

NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What new weights cost: bytes moved, seconds until the other end had them all, and seconds between two steps.

    `pause` is None until they are swapped in.
    """

    version: int
    nbytes: int
    seconds: float
    pause: float | None = None


class RemoteEngine:
    """Started at once, without weights: requests wait for the first `load_weights`. Close it, or use it in a `with`.

    `model` is the model's config.json, `dtype` what its weights are there (and travel as); `config.quantization` rounds
    them there. One thread submits and steps; another may load weights meanwhile.

    Raises:
        WorkerError: it did not start; with its last words.
    """

    _meeting: Meeting | None = None

    def __init__(
        self,
        model: Mapping[str, Any],
        config: EngineConfig,
        *,
        dtype: torch.dtype = torch.float32,
        eos_ids: tuple[int, ...] = (),
        remote: RemoteConfig | None = None,
    ) -> None:
        self.config, self.remote = config, remote or RemoteConfig()
        self._model, self._dtype, self._eos_ids = dict(model), dtype, eos_ids
        self._limit = max(1, int(self.remote.bucket_mb * 2**20))
        self._buckets = Buckets(decoder_tensors(Decoder(spec_from(model), dtype=dtype, device="meta")), self._limit)
        self._news = threading.Condition()
        self._loading = threading.Lock()
        self._frames: deque[list[Output]] = deque()
        self._live: dict[str, Request] = {}
        self._ended: set[str] = set()  # their end is in a frame
        self._aborted: set[str] = set()
        self.version = NOTHING
        """Of the weights that the generator steps with now; each Output says which made it."""
        self.last: Transfer | None = None
        self.asleep = False
        shared, limit = self.remote.transport == "shared", self.remote.patience + self.remote.step_limit
        self._ring = Ring(self._buckets.dtypes + 1, self._buckets.largest, self._check, shared=shared, limit=limit)
        self.limits = Limits(max_model_len=0, vocab=0, cache_tokens=0)
        self._pair: Pair | None = None
        self._forget()
        try:
            self._start()
        except BaseException:
            self._ring.close()
            if self._meeting is not None:
                self._meeting.close()
            raise

    # ------------------------------------------------------------------------------------ life
    def _forget(self) -> None:
        """What the process said that is gone, or has not come yet."""
        self._fault: str | None = None
        self._ready: wire.Ready | None = None
        self._waiting: int | None = None
        self._staged: wire.Staged | wire.Torn | None = None
        self._asked: deque[list[EngineStats]] = deque()
        self._rested = False
        self.version = NOTHING

    def _start(self) -> None:
        self._meeting = Meeting(self.remote.address) if self._ring.file is None else None
        files = () if self._ring.file is None else (self._ring.file,)
        self._child = Child(self.remote, self._hear, self._lose, files)
        self._child.send(
            wire.Start(
                model=self._model,
                engine=asdict(self.config),
                dtype=str(self._dtype).removeprefix("torch."),
                eos_ids=self._eos_ids,
                bucket_bytes=self._limit,
                fingerprint=self._buckets.fingerprint,
                threads=self.remote.threads,
                shared=None if self._ring.file is None else (self._ring.file, self._ring.size),
                store=self._meeting.name if self._meeting else None,
                patience=self.remote.patience,
            )
        )
        try:
            self._wait(lambda: self._ready is not None, self.remote.start_limit, "start")
        except WorkerError:
            self._child.close(0.0)
            raise
        ready = self._ready
        assert ready is not None
        self.limits = Limits(max_model_len=ready.max_model_len, vocab=ready.vocab, cache_tokens=ready.cache_tokens)
        self._pair = Pair(self._meeting.name, TRAINER, self.remote.patience) if self._meeting else None

    @property
    def pid(self) -> int:
        """The generator's process."""
        return self._child.pid

    def restart(self) -> None:
        """Start a new process in the place of one that is gone, or of this one, and give it the requests under way.

        They go on behind the tokens that have come, once `load_weights` has given it the newest weights.
        """
        self._child.close(0.0)
        if self._meeting is not None:
            self._meeting.close()
        self._ring.reset()
        self._forget()
        self._start()
        with self._news:
            live = [request for name, request in self._live.items() if name not in self._aborted]
            for name in self._aborted & self._live.keys():
                del self._live[name]
            self._aborted.clear()
        for request in live:
            self._child.send(wire.Submit(**request.wire()))
        if self.asleep:
            self.asleep = False
            self.sleep()

    def close(self) -> None:
        """End the process; who waits for it is told."""
        self._child.close()
        self._lose("the generator was closed")
        self._ring.close()
        if self._meeting is not None:
            self._meeting.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------ requests
    def submit(self, request: Request) -> None:
        """Queue a request; its Outputs come from `step`, the last one with `finish` set.

        Raises:
            RequestError: malformed, out of the context, or its id is in use.
            CapacityError: it could never fit the cache.
            WorkerError: the process is gone.
        """
        self.limits.room(request)
        with self._news:
            self._check()
            if request.id in self._live or request.id in self._ended:
                raise RequestError(f"request id '{request.id}' is in use: give each request its own", "id")
            self._live[request.id] = _followed(request)
        self._child.send(wire.Submit(**request.wire()))

    def abort(self, request_id: str) -> None:
        """End a request; unknown and ended ids are ignored. Nothing but its end comes from `step` any more."""
        with self._news:
            if request_id not in self._live and request_id not in self._ended:
                return
            self._aborted.add(request_id)
        self._child.send(wire.Abort(request_id))

    @property
    def has_work(self) -> bool:
        """Whether a step would tell something, now or when it comes."""
        with self._news:
            return bool(self._frames or self._live)

    def step(self) -> list[Output]:
        """What one step of the generator said, in order; waits for it.

        Raises:
            StateError: it sleeps, or has no weights.
            WorkerError: the process is gone; requests under way are kept for `restart`.
        """
        with self._news:
            while not self._frames:
                if not self._live:
                    return []
                if self.asleep:
                    raise StateError("the engine sleeps: wake it first")
                if self.version == NOTHING and not self._loading.locked():
                    raise StateError("the engine has no weights yet: load_weights first")
                self._check()
                self._news.wait(1.0)
            outputs = self._frames.popleft()
            self._ended.difference_update(output.request_id for output in outputs if output.finish is not None)
        return [told for output in outputs if (told := self._passed(output)) is not None]

    def _passed(self, output: Output) -> Output | None:
        """An output as the consumer is to have it: of an aborted request its end alone."""
        if output.request_id not in self._aborted:
            return output
        if output.finish is None:
            return None
        self._aborted.discard(output.request_id)
        return msgspec.structs.replace(output, tokens=(), prompt=None, finish=State.ABORT, stop_reason=None)

    # ------------------------------------------------------------------------------------ weights and memory
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> Transfer:
        """Send new weights and go on with them at once; requests under way are computed anew. `stage`, then `swap`."""
        self.stage(named_tensors, version)
        return self.swap()

    def stage(self, named_tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> Transfer:
        """Send new weights under the checkpoint's names, in the order of `decoder_tensors`, beside those in force.

        Back when all is there and checked, so that the tensors may change again. Meanwhile the generator steps on.
        Weights that were staged and not swapped in are replaced.

        Raises:
            ConfigError: no tensors, or a version that is not above the last one.
            CheckpointError: an unknown, misshapen or missing tensor. The old weights stay in force.
            WorkerError: the transfer failed (the old weights stay in force), or the process is gone.
        """
        if named_tensors is None:
            raise ConfigError("a remote engine has weights of its own: give it the trainer's (`decoder_tensors`)")
        with self._loading:
            self._check()
            if version <= self.version:
                raise ConfigError(f"weights version {version} is not above {self.version}: count versions upwards")
            began = time.perf_counter()
            self._waiting = None
            self._send(named_tensors, version)
            self._waiting = version
            self.last = Transfer(
                version=version, nbytes=self._buckets.nbytes, seconds=time.perf_counter() - began, pause=None
            )
            return self.last

    def swap(self) -> Transfer:
        """Have the generator go on with what was staged, from its next step on.

        Raises:
            StateError: nothing was staged.
            WorkerError: the process is gone.
        """
        with self._loading:
            if self._waiting is None:
                raise StateError("no weights wait to be swapped in: stage some first")
            version, self._waiting = self._waiting, None
            self._child.send(wire.Swap(version))
            self._wait(lambda: self.version == version, self.remote.step_limit + self.remote.patience, "swap")
            assert self.last is not None
            return self.last

    def _send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """All buckets, until the other end says that it has them."""
        self._staged = None
        self._child.send(wire.Offer(version))
        try:
            with torch.no_grad():
                for number, data in self._buckets.pack(named_tensors, self._ring.room):
                    self._raise_torn(version)
                    self._child.send(wire.Filled(version, number, self._ring.slot_of(number), checksum(data)))
                    if self._pair is not None:
                        self._pair.send(data)
            if self._pair is not None:
                self._pair.settle()
            self._wait(lambda: self._staged is not None, self.remote.patience + self.remote.step_limit, "take weights")
            self._raise_torn(version)
        except BaseException:
            self._ring.unsent()
            self._child.send(wire.Drop(version))
            with suppress(WorkerError):  # its answer is not to be taken for that to the next offer
                self._wait(lambda: self._staged is not None, self.remote.patience, "drop weights")
            raise

    def _raise_torn(self, version: int) -> None:
        if isinstance(self._staged, wire.Torn):
            raise WorkerError(
                f"weights version {version} did not arrive whole: {self._staged.why}; version {self.version} stays in "
                "force, and this one may be sent again"
            )

    def sleep(self) -> None:
        """Give the KV cache's memory back. Requests keep their tokens, and are computed anew after `wake`."""
        self._rest(True)

    def wake(self) -> None:
        """Take the KV cache's memory again."""
        self._rest(False)

    def _rest(self, asleep: bool) -> None:
        self._rested = False
        self._child.send(wire.Rest(asleep))
        self._wait(lambda: self._rested, self.remote.step_limit + self.remote.patience, "rest")
        self.asleep = asleep

    def stats(self) -> EngineStats:
        """Gauges and counters of the generator's engine."""
        told: list[EngineStats] = []
        self._asked.append(told)
        self._child.send(wire.Ask())
        self._wait(lambda: bool(told), self.remote.step_limit + self.remote.patience, "answer")
        return told[0]

    # ------------------------------------------------------------------------------------ what it says
    def _hear(self, message: wire.ToTrainer) -> None:
        """A message, in the thread that reads them."""
        if isinstance(message, wire.Taken):
            self._ring.taken(message.slot)
            return
        with self._news:
            match message:
                case wire.Said(outputs=outputs):
                    self._note(outputs)
                    self._frames.append(outputs)
                case wire.Ready():
                    self._ready = message
                case wire.Staged() | wire.Torn():
                    self._staged = message
                case wire.Swapped(version=version, pause=pause):
                    self.version = version
                    if self.last is not None:
                        self.last = replace(self.last, pause=pause)
                case wire.Rested():
                    self._rested = True
                case wire.Told(stats=stats):
                    self._asked.popleft().append(stats)
            self._news.notify_all()

    def _note(self, outputs: list[Output]) -> None:
        """What requests under way have said so far, for a new process to go on from."""
        for output in outputs:
            request = self._live.get(output.request_id)
            if request is not None:
                request.output_ids.extend(token.id for token in output.tokens)
                if output.finish is not None:
                    del self._live[output.request_id]
                    self._ended.add(output.request_id)

    def _lose(self, why: str) -> None:
        with self._news:
            self._fault = why
            self._news.notify_all()

    def _check(self) -> None:
        if self._fault is not None:
            raise WorkerError(self._fault)

    def _wait(self, done: Callable[[], bool], limit: float, what: str) -> None:
        ends = time.monotonic() + limit
        with self._news:
            while not done():
                self._check()
                if time.monotonic() > ends:
                    self._child.kill()
                    raise WorkerError(f"the generator did not {what} within {limit:g} s, and was ended")
                self._news.wait(0.5)


def _followed(request: Request) -> Request:
    """A copy whose outputs are its own, to follow what another process does with it."""
    return replace(request, output_ids=list(request.output_ids))
