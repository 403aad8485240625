"""Lines and batches at work. A result is one write at the end of a file, so a server that dies has lost none and, when
it goes on, asks again only what has no result: no line is lost and none is answered twice.

    validating ─▶ in_progress ─▶ finalizing ─▶ completed
        │             │  ├─ window over ─▶ finalizing ─▶ expired
        ▼ failed      │  └─ told to     ─▶ cancelling ─▶ cancelled
                      └── server ends: all of it stays as it is, and goes on with the next one on the same folder
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .files import Files, new_id, write_whole
from .lines import Failure, Line, Place, Reply, Result, done, index, read
from .shapes import BatchObject, BatchUsage, Counts, FileObject, LineError, LineErrors

log = logging.getLogger("twofold.serve")

Ask = Callable[[str, dict[str, Any], float], Awaitable[tuple[int, str, bytes]]]
Room = Callable[[str, int], bool]

TRIES = 6  # of a line that is answered 503, with longer and longer waits
FULL_SECONDS = 0.02  # between two looks for room
ENDS = {
    "expired": Failure("batch_expired", "the batch's completion window was over before this line was answered"),
    "cancelled": Failure("batch_cancelled", "the batch was cancelled before this line was answered"),
}


class Work:
    """Lines of one file answered into two others, several at a time, as many as `room` allows.

    `ask` is given a path, a body and how many seconds it may take; `ends_at` is a `time.time()`.
    """

    def __init__(self, source: Path, out: Path, err: Path, ask: Ask, room: Room, ends_at: float) -> None:
        self.counts = Counts()
        self.usage = BatchUsage()
        self.model: str | None = None
        self._source = source
        self._paths = (out, err)
        self._ask = ask
        self._room = room
        self._ends_at = ends_at
        self._flying: set[asyncio.Task[None]] = set()
        self._files: list[BinaryIO] = []

    async def run(self, places: Sequence[Place]) -> bool:
        """Answer what has no answer yet; False when the time was over first."""
        pending = await self._pending(places)
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(path.open("ab", buffering=0)) for path in self._paths]
            try:
                for place in pending:
                    await self._wait_for_room(place.model)
                    if time.time() >= self._ends_at:
                        break
                    self._begin(place)
                while self._flying:
                    await asyncio.wait(self._flying)
            finally:
                flying = list(self._flying)
                for task in flying:
                    task.cancel()
                await asyncio.gather(*flying, return_exceptions=True)
        return self.counts.completed + self.counts.failed == self.counts.total

    async def close(self, places: Sequence[Place], why: Failure) -> None:
        """Give every line that has no answer `why`."""
        with self._paths[1].open("ab", buffering=0) as self_err:
            self._files = [self_err, self_err]
            for place in await self._pending(places):
                self._record(place, Result(id=_new_id(), custom_id=place.custom_id, error=why))

    async def _pending(self, places: Sequence[Place]) -> list[Place]:
        results = await asyncio.to_thread(done, self._paths)
        self.counts, self.usage = Counts(total=len(places)), BatchUsage()
        for result in results.values():
            self._count(result)
        return [place for place in places if place.custom_id not in results]

    async def _wait_for_room(self, model: str) -> None:
        while not self._room(model, len(self._flying)):
            if time.time() >= self._ends_at:
                return
            await asyncio.sleep(FULL_SECONDS)

    def _begin(self, place: Place) -> None:
        task = asyncio.create_task(self._one(place), name=place.custom_id)
        self._flying.add(task)
        task.add_done_callback(self._flying.discard)

    async def _one(self, place: Place) -> None:
        try:
            line = await asyncio.to_thread(read, self._source, place)
            refused = _refused(line)
            status, name, body = refused if refused is not None else await self._patiently(line)
        except Exception as error:
            log.exception("a batch's line failed")
            result = Result(id=_new_id(), custom_id=place.custom_id, error=Failure("internal_error", str(error)[:300]))
        else:
            result = Result(id=_new_id(), custom_id=place.custom_id)
            if status == 504 and time.time() >= self._ends_at:
                result.error = ENDS["expired"]
            else:
                result.response = Reply(status, name, msgspec.Raw(body))
        self._record(place, result)

    async def _patiently(self, line: Line) -> tuple[int, str, bytes]:
        """The answer; a full queue is waited for, a model that is not there only so long."""
        tries, wait = 0, 0.05
        while True:
            left = max(self._ends_at - time.time(), 0.1)
            status, name, body = await self._ask(line.url, line.body, left)
            tries += status == 503
            if status not in (429, 503) or tries >= TRIES or left <= wait:
                return status, name, body
            await asyncio.sleep(wait)
            wait = min(2 * wait, 30.0)

    def _record(self, place: Place, result: Result) -> None:
        """One write, and then it is done."""
        good = result.response is not None and result.response.status_code < 400
        self._files[0 if good else 1].write(msgspec.json.encode(result) + b"\n")
        self._count(result)

    def _count(self, result: Result) -> None:
        if result.response is None or result.response.status_code >= 400:
            self.counts.failed += 1
            return
        self.counts.completed += 1
        with contextlib.suppress(msgspec.MsgspecError):
            told = msgspec.json.decode(result.response.body, type=_Told)
            self.model = self.model or told.model
            usage = told.usage or _Tokens()
            spent, said = usage.prompt_tokens or usage.input_tokens, usage.completion_tokens or usage.output_tokens
            self.usage.input_tokens += spent
            self.usage.output_tokens += said
            self.usage.total_tokens += spent + said


class _Tokens(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Told(msgspec.Struct):
    model: str | None = None
    usage: _Tokens | None = None


def _refused(line: Line) -> tuple[int, str, bytes] | None:
    """What a line may not ask for, since nobody is there to listen."""
    for name in ("stream", "background"):
        if line.body.get(name):
            error = {"message": f"{name} has no meaning in a batch: leave it out", "type": "invalid_request_error"}
            return 400, "", msgspec.json.encode({"error": {**error, "param": name, "code": "invalid_value"}})
    return None


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


class Saved(msgspec.Struct):
    """What is written of a batch."""

    owner: str
    batch: BatchObject


class Job:
    """One batch. What it is told of it is on disk before anybody hears of it."""

    def __init__(self, files: Files, saved: Saved, ask: Ask, room: Room, most_lines: int) -> None:
        self.saved = saved
        self.batch = saved.batch
        self._files = files
        self._most = most_lines
        self._out, self._err = (files.batches / f"{self.batch.id}.{kind}" for kind in ("out", "err"))
        source = files.data(self.batch.input_file_id)
        self._work = Work(source, self._out, self._err, ask, room, self.batch.expires_at)
        self._source = source

    def save(self) -> None:
        write_whole(self._files.batches / f"{self.batch.id}.json", msgspec.json.encode(self.saved))

    def show(self) -> BatchObject:
        """The batch with its counts as they are now."""
        if not self.batch.over and self.batch.status != "validating":
            self.batch.request_counts, self.batch.usage = self._work.counts, self._work.usage
            self.batch.model = self.batch.model or self._work.model
        return self.batch

    async def run(self) -> None:
        """From wherever it stands to its end."""
        batch = self.batch
        try:
            places, errors = await asyncio.to_thread(index, self._source, (batch.endpoint,), self._most)
            if errors:
                batch.errors = LineErrors(errors)
                self._enter("failed")
                return
            if batch.status == "validating":
                batch.request_counts = Counts(total=len(places))
                self._enter("in_progress")
            end = "cancelled" if batch.status == "cancelling" else "completed"
            if batch.status == "in_progress" and not await self._work.run(places):
                end = "expired"
            await self._finish(places, end)
        except OSError as error:
            log.error("batch %s failed: %s", batch.id, error)
            batch.errors = LineErrors([LineError("storage_error", f"the files could not be kept: {error.strerror}")])
            self._enter("failed")

    async def _finish(self, places: Sequence[Place], end: str) -> None:
        batch = self.batch
        if batch.status == "finalizing":  # the server ended in the middle of this
            end = "expired" if batch.expired_at else "completed"
        await self._work.close(places, ENDS.get(end, ENDS["expired"]))
        self.show()
        if batch.status == "in_progress":
            batch.expired_at = int(time.time()) if end == "expired" else None
            batch.output_file_id, batch.error_file_id = new_id(), new_id()
            self._enter("finalizing")
        elif batch.output_file_id is None:
            batch.output_file_id, batch.error_file_id = new_id(), new_id()
            self.save()
        batch.output_file_id = self._adopt(self._out, batch.output_file_id, "output")
        batch.error_file_id = self._adopt(self._err, batch.error_file_id, "errors")
        self._enter(end)

    def _adopt(self, path: Path, name: str | None, kind: str) -> str | None:
        """Make a file that clients can fetch of one that has lines."""
        if name is None or self._files.has(name):
            return name
        size = path.stat().st_size if path.exists() else 0
        if not size:
            path.unlink(missing_ok=True)
            return None
        file = FileObject(
            id=name, bytes=size, created_at=int(time.time()), filename=f"{self.batch.id}_{kind}.jsonl",
            purpose="batch_output",
        )  # fmt: skip
        self._files.adopt(path, self.saved.owner, file)
        return name

    def _enter(self, status: str) -> None:
        self.batch.status = status
        setattr(self.batch, f"{status}_at", int(time.time()))
        self.save()
