"""Where activations wait for their backward pass: where they were made, in host memory, or in a file.

    device   as autograd would keep them
    host     pinned host memory, copied behind the device's work; on a CPU that is where they are already
    disk     one file without a name, mapped into memory in segments: filled upwards as the forward pass goes, read
             downwards as the backward pass comes back, and gone with the process however it ends

What moves is the storage, once, whatever number of ops keep it and however they view it. DeepSpeed's cpu_checkpointing
moves the inputs of whole layers; this moves whatever a policy leaves to keep.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core import CapacityError
from .policies import Place

SEGMENT = 64 << 20
"""Bytes by which the file grows; a larger tensor has a segment of its own."""
LINE = 64
SMALLEST = 1 << 12
"""Bytes of the smallest storage that is worth moving."""


class Keeper(Protocol):
    """Takes a tensor when an op saves it, and gives back an equal one when its gradient is due."""

    def keep(self, tensor: Tensor) -> Any: ...

    def fetch(self, kept: Any) -> Tensor: ...


def keeper(place: Place, folder: Path | None = None) -> Keeper:
    """The keeper of one of the places; `folder` is where the file of "disk" lies (the system's own when not given)."""
    return OnDevice() if place == "device" else Host() if place == "host" else Disk(folder)


class OnDevice:
    """Tensors stay where they are."""

    def keep(self, tensor: Tensor) -> Tensor:
        return tensor.detach()  # the tensor itself may know the node that keeps it, and neither would be let go

    def fetch(self, kept: Tensor) -> Tensor:
        return kept


class Stored:
    """A storage that was moved: what `get` needs, and the copy that is back, as long as somebody holds it."""

    __slots__ = ("__weakref__", "back", "device", "what")

    def __init__(self, what: Any, device: torch.device) -> None:
        self.what, self.device = what, device
        self.back: weakref.ref[torch.UntypedStorage] | None = None


class View(NamedTuple):
    """How a tensor lay in a storage."""

    stored: Stored
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Away(ABC):
    """Moves storages by `put` and brings them back by `get`; small ones stay."""

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, weakref.ref[Stored]] = weakref.WeakKeyDictionary()

    @abstractmethod
    def put(self, bytes_: Tensor) -> Stored:
        """Copy a storage, seen as a flat tensor of bytes."""

    @abstractmethod
    def get(self, stored: Stored) -> Tensor:
        """A copy of the bytes, on the device they came from."""

    def stays(self, tensor: Tensor) -> bool:
        """Whether it is not worth moving."""
        return tensor.untyped_storage().nbytes() < SMALLEST

    def keep(self, tensor: Tensor) -> Tensor | View:
        tensor = tensor.detach()
        if self.stays(tensor):
            return tensor
        storage = tensor.untyped_storage()
        found = self._seen.get(storage)
        stored = found() if found else None
        if stored is None:
            stored = self.put(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            self._seen[storage] = weakref.ref(stored)
        return View(stored, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def fetch(self, kept: Tensor | View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        stored = kept.stored
        storage = stored.back() if stored.back else None
        if storage is None:
            storage = self.get(stored).untyped_storage()
            stored.back = weakref.ref(storage)
        return torch.empty(0, dtype=kept.dtype, device=stored.device).set_(storage, kept.offset, kept.size, kept.stride)


class Host(Away):
    """Pinned host memory; a tensor of the host stays where it is."""

    def stays(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" or super().stays(tensor)

    def put(self, bytes_: Tensor) -> Stored:
        there = torch.empty(bytes_.shape, dtype=torch.uint8, pin_memory=bytes_.is_cuda)
        return Stored(there.copy_(bytes_, non_blocking=True), bytes_.device)

    def get(self, stored: Stored) -> Tensor:
        there: Tensor = stored.what
        return there.to(stored.device, non_blocking=True, copy=True)


class Disk(Away):
    """A file in `folder` that never has a name, so that no crash leaves it behind.

    Raises:
        CapacityError: the disk is full.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".activations-")  # noqa: SIM115  it lives as long as we
        self._segments: list[_Segment] = []
        self._at = 0
        self._lock = threading.Lock()  # a device's backward pass lets go in a thread of its own

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(len(segment.map) for segment in self._segments)

    @property
    def live(self) -> int:
        """Storages that are kept now."""
        return sum(segment.live for segment in self._segments)

    def put(self, bytes_: Tensor) -> Stored:
        count = len(bytes_)
        with self._lock:
            segment = self._room(count)
            start = segment.take(count)
        segment.bytes[start : start + count] = bytes_.cpu().numpy()
        stored = Stored((segment, start, count), bytes_.device)
        weakref.finalize(stored, self._let_go, segment).atexit = False
        return stored

    def get(self, stored: Stored) -> Tensor:
        segment, start, count = stored.what
        if segment.number and not segment.asked:
            self._segments[segment.number - 1].advise("MADV_WILLNEED")  # the one that is read next
            segment.asked = True
        here = torch.empty(count, dtype=torch.uint8)
        here.numpy()[:] = segment.bytes[start : start + count]
        return here.to(stored.device)

    def _room(self, count: int) -> _Segment:
        if self._segments and self._segments[self._at].fits(count):
            return self._segments[self._at]
        if self._segments:
            self._segments[self._at].advise("MADV_DONTNEED")  # full: its pages are the system's, to write and let go
        empty = (s for s in self._segments if not s.live and s.fits(count))
        segment = next(empty, None) or self._grow(max(SEGMENT, _whole(count, mmap.ALLOCATIONGRANULARITY)))
        self._at = segment.number
        return segment

    def _grow(self, size: int) -> _Segment:
        start = self.size
        reserve = getattr(os, "posix_fallocate", lambda file, first, more: os.ftruncate(file, first + more))
        try:
            reserve(self._file.fileno(), start, size)  # a page that finds no room later would end the process
        except OSError as error:
            raise CapacityError(
                f"activations need {size >> 20} MiB more on disk beside {start >> 20}: {error.strerror}. Free some, "
                "or give a run.output on a larger disk, smaller data.micro_tokens, a model.recompute that keeps less"
            ) from error
        segment = _Segment(mmap.mmap(self._file.fileno(), size, offset=start), len(self._segments))
        self._segments.append(segment)
        return segment

    def _let_go(self, segment: _Segment) -> None:
        with self._lock:
            segment.live -= 1
            if not segment.live:
                segment.used, segment.asked = 0, False
                segment.advise("MADV_DONTNEED")


class _Segment:
    """A stretch of the file, filled from its start and taken anew when nothing in it is kept any more."""

    def __init__(self, mapped: mmap.mmap, number: int) -> None:
        self.map, self.number = mapped, number
        self.bytes = np.frombuffer(mapped, dtype=np.uint8)
        self.used, self.live, self.asked = 0, 0, False

    def fits(self, count: int) -> bool:
        return self.used + count <= len(self.map)

    def take(self, count: int) -> int:
        start, self.live = self.used, self.live + 1
        self.used += _whole(count, LINE)
        return start

    def advise(self, what: str) -> None:
        if hasattr(mmap, what):
            self.map.madvise(getattr(mmap, what))


def _whole(count: int, step: int) -> int:
    """The multiple of `step` that holds `count`."""
    return -(-count // step) * step
