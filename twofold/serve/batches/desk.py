"""Desk: which batches run, and when they give way to those who wait for their answers.

A batch's lines are asked only where a model has places free and nobody waits for one, and then fill at most half of
them; whoever comes finds room at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from ...core import CapacityError, RequestError
from ..client import EngineClient, Phase
from ..errors import HttpError
from .files import Files
from .inside import Inside
from .job import Job, Room, Saved
from .shapes import BatchObject, BatchRequest

log = logging.getLogger("twofold.serve")

AT_ONCE = 4  # batches; the others stand in a queue
WINDOW = re.compile(r"(\d{1,5})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_WINDOW = 30 * 86400


class Desk:
    """All batches of a server. `room` says whether one more line may be asked of a model."""

    def __init__(self, files: Files, inside: Inside, room: Room) -> None:
        self.files = files
        self._inside = inside
        self._room = room
        self._jobs: dict[str, Job] = {}  # oldest first
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        self._stopped = False

    def start(self) -> None:
        """Go on with what an earlier server on this folder left."""
        found = []
        for path in self.files.batches.glob("*.json"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Saved))
        for saved in sorted(found, key=lambda saved: saved.batch.created_at):
            self._add(saved)
        if self._tasks:
            log.info("%d batches go on", len(self._tasks))

    async def stop(self) -> None:
        """Leave every batch as it stands."""
        self._stopped = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def create(self, owner: str, asked: BatchRequest) -> BatchObject:
        """Begin a batch.

        Raises:
            HttpError, RequestError: no such file, or no such window.
            CapacityError: too many batches are under way.
        """
        self.files.get(owner, asked.input_file_id, "input_file_id", 400)
        now = int(time.time())
        saved = Saved(
            owner,
            BatchObject(
                id=f"batch_{secrets.token_hex(12)}",
                endpoint=asked.endpoint,
                input_file_id=asked.input_file_id,
                completion_window=asked.completion_window,
                created_at=now,
                expires_at=now + window(asked.completion_window),
                metadata=asked.metadata,
            ),
        )
        self._make_room()
        job = self._add(saved)
        job.save()
        return job.batch

    def get(self, owner: str, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None or job.saved.owner != owner:
            raise HttpError(404, f"no batch '{name:.80}': see /v1/batches", code="batch_not_found")
        return job

    def listing(self, owner: str) -> list[BatchObject]:
        """This owner's batches, newest first."""
        return [job.show() for job in reversed(self._jobs.values()) if job.saved.owner == owner]

    def uses(self, file: str) -> bool:
        """Whether a batch that is not over reads this file."""
        return any(job.batch.input_file_id == file and not job.batch.over for job in self._jobs.values())

    async def cancel(self, job: Job) -> BatchObject:
        """End a batch with what it has; one that is over stays as it is."""
        batch = job.batch
        if not batch.over and batch.status != "finalizing":
            if (task := self._tasks.get(batch.id)) is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            if not batch.over and batch.status != "finalizing":
                job.show()
                batch.status, batch.cancelling_at = "cancelling", int(time.time())
                job.save()
            self._run(job)
        return batch

    # -- inside -----------------------------------------------------------------------------------------------------

    def _add(self, saved: Saved) -> Job:
        ask = partial(self._ask, saved.owner)
        job = Job(self.files, saved, ask, self._room, self.files.limits.batch_lines)
        self._jobs[saved.batch.id] = job
        if not saved.batch.over:
            self._run(job)
        return job

    async def _ask(self, owner: str, path: str, body: dict[str, Any], seconds: float) -> tuple[int, str, bytes]:
        return await self._inside.post(path, body, owner, seconds)

    def _run(self, job: Job) -> None:
        task = asyncio.create_task(self._in_turn(job), name=job.batch.id)
        self._tasks[job.batch.id] = task
        task.add_done_callback(lambda done: self._ended(job.batch.id, done))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("batch %s failed", name, exc_info=error)

    async def _in_turn(self, job: Job) -> None:
        async with self._places:
            await job.run()

    def _make_room(self) -> None:
        if len(self._jobs) < self.files.limits.batches:
            return
        for name, job in self._jobs.items():
            if job.batch.over:
                del self._jobs[name]
                (self.files.batches / f"{name}.json").unlink(missing_ok=True)
                return
        raise CapacityError(f"{len(self._jobs)} batches are under way, no more fit: wait for one")


def window(given: str) -> int:
    """The seconds of a completion window; RequestError for what is none."""
    match = WINDOW.fullmatch(given)
    seconds = int(match[1]) * SECONDS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_WINDOW:
        raise RequestError(
            f"completion_window is like 24h, 90m or 7d, at most 30d, not {given!r:.40}", "completion_window"
        )
    return seconds


def spare(client: Callable[[str], EngineClient | None]) -> Room:
    """What gives way: a model's room for one more line, `mine` of a batch being under way."""

    def room(model: str, mine: int) -> bool:
        found = client(model)
        if found is None or found.info is None or found.phase in (Phase.FAILED, Phase.STOPPED):
            return mine < 1  # the answer says what is wrong, or brings the model in
        most = found.info.max_running
        return found.ready and not found.stats.waiting and mine < max(most // 2, 1) and len(found.live) < most

    return room
