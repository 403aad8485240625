"""Channel: how a bucket of weights gets from one process into another, by a ring of slots in memory.

    trainer                                           generator
    room ─▶ slot 0 ─▶ filled ─▶ (shared: the same memory) ─▶ checked, copied to its place ─▶ taken ─▶ room
            slot 1 ...          (gloo: sent, received)

One slot is filled while another is read. Shared memory costs one copy on each side; gloo adds its way through sockets,
and is for two machines.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import CapacityError, WorkerError
from ..parallel.ranks import LOOPBACK

TRAINER, GENERATOR = 0, 1


class Ring:
    """The trainer's end: slots to fill. `check` raises when the other end is gone."""

    def __init__(self, slots: int, size: int, check: Callable[[], None], *, shared: bool, limit: float) -> None:
        """`limit`: seconds that the other end may take for a bucket."""
        self.size, self._limit = size, limit
        self.file: int | None = None
        if shared:
            self.file = os.memfd_create("twofold-weights")
            try:
                os.ftruncate(self.file, slots * size)
                memory = torch.frombuffer(mmap.mmap(self.file, slots * size), dtype=torch.uint8)
            except OSError as error:
                os.close(self.file)
                raise CapacityError(
                    f"{slots * size / 2**20:.0f} MiB of shared memory for weights in transit cannot be had: "
                    f"{error.strerror}; lower rollout.remote.bucket_mb"
                ) from None
        else:
            memory = torch.empty(slots * size, dtype=torch.uint8)
        self._memory, self._check = memory.view(slots, size), check
        self._free = list(range(slots))
        self._news = threading.Condition()
        self._slot_of: dict[int, int] = {}

    def room(self, number: int, nbytes: int) -> Tensor:
        """Memory for a bucket, as soon as a slot is free.

        Raises:
            WorkerError: the other end is gone, or takes none in time.
        """
        ends = time.monotonic() + self._limit
        with self._news:
            while not self._free:
                self._check()
                if time.monotonic() > ends:
                    raise WorkerError(f"the generator took no bucket of weights for {self._limit:g} s")
                self._news.wait(0.1)
            slot = self._slot_of[number] = self._free.pop()
        return self._memory[slot, :nbytes]

    def slot_of(self, number: int) -> int:
        """Where a bucket was put."""
        return self._slot_of.pop(number)

    def taken(self, slot: int) -> None:
        """A slot is free again."""
        with self._news:
            self._free.append(slot)
            self._news.notify_all()

    def unsent(self) -> None:
        """Free the slots of buckets that were never filled, after a failure."""
        for number in tuple(self._slot_of):
            self.taken(self._slot_of.pop(number))

    def reset(self) -> None:
        """Free all slots: the other end is a new one."""
        with self._news:
            self._slot_of.clear()
            self._free = list(range(len(self._memory)))

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
        self._memory = self._memory.new_empty(0, 0)  # the map has a descriptor of its own, and goes with its last view


class Inlet(Protocol):
    """The generator's end."""

    def receive(self, slot: int, nbytes: int) -> Tensor: ...


class SharedInlet:
    """Slots of the trainer's memory, read where they are."""

    def __init__(self, file: int, size: int) -> None:
        total = os.fstat(file).st_size
        self._memory = torch.frombuffer(mmap.mmap(file, total), dtype=torch.uint8).view(-1, size)

    def receive(self, slot: int, nbytes: int) -> Tensor:
        return self._memory[slot, :nbytes]


class Pair:
    """A gloo group of two, the trainer and its generator, apart from whatever groups a process is in."""

    def __init__(self, store: str, rank: int, patience: float) -> None:
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=patience)
        if store.startswith("/"):
            meeting: Any = dist.FileStore(store, 2)  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        else:
            host, _, port = store.rpartition(":")
            meeting = dist.TCPStore(host, int(port), 2, False, timedelta(seconds=patience))  # type: ignore[attr-defined]
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        self._group: Any = dist.ProcessGroupGloo(meeting, rank, 2, options)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._sent: list[Any] = []

    def send(self, data: Tensor) -> None:
        """Begin to give a bucket to the other."""
        self._sent.append(self._group.send([data], GENERATOR, 0))

    def settle(self) -> None:
        """Until everything has gone.

        Raises:
            WorkerError: the other is gone, or takes none.
        """
        sent, self._sent = self._sent, []
        try:
            for sending in sent:
                sending.wait()
        except RuntimeError as error:
            raise WorkerError(f"weights could not be sent: {str(error).splitlines()[0]}") from None

    def receive(self, slot: int, nbytes: int) -> Tensor:
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        data = self._buffer[:nbytes]
        self._group.recv([data], TRAINER, 0).wait()
        return data


class Meeting:
    """Where a Pair meets, made by the trainer: a file of this machine, or a port of it when others are to come."""

    def __init__(self, address: str) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: Any = None
        if address:
            self._store = dist.TCPStore(address, 0, 2, True, wait_for_workers=False)  # type: ignore[attr-defined]
            self.name = f"{address}:{self._store.port}"
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="twofold-")
            self.name = os.path.join(self._folder.name, "meeting")

    def close(self) -> None:
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
