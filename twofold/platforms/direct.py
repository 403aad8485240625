"""Direct: a file that is read past the system's cache, so that what was read is in memory once, where it was asked for.

    disk ──────────────▶ room        O_DIRECT: places, lengths and rooms are whole pages
    disk ─▶ cache ─▶ room            where the file system has no such reads (tmpfs of old kernels, some overlays): the
                                     cache is told to forget each range as soon as it was copied

Memory that a control group limits counts the cache too, though the kernel gives it back when it must; past the cache
there is nothing to give back, and nothing that other files lose.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096
"""What places, lengths and rooms of such a read are multiples of; disks ask for 512 or 4096."""


class Direct:
    """A file open for reads of whole pages.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.past_cache = False
        plain = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        try:
            self._file = os.open(path, plain | os.O_DIRECT)
            self.past_cache = True
        except (OSError, AttributeError):  # EINVAL where it is not known; what else is wrong, the next line says
            self._file = os.open(path, plain)
        self._closed = weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read(self, at: int, room: memoryview) -> None:
        """Fill `room` with the bytes from `at` on.

        Raises:
            OSError: the disk fails, or the file ends before.
        """
        while room:
            count = os.preadv(self._file, [room], at)
            if count <= 0 or (count % PAGE and count < len(room)):
                raise OSError(0, f"it ended at byte {at + max(count, 0)} while it was read")
            if not self.past_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, at, count, os.POSIX_FADV_DONTNEED)
            at, room = at + count, room[count:]

    def close(self) -> None:
        self._closed()


def room(size: int) -> Tensor:
    """Memory [size] of bytes of this process's own, beginning with a page; in huge pages where the system has them.

    Raises:
        MemoryError: there is no such room.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        taken = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"cannot allocate {size} bytes") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            taken.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(taken, dtype=torch.uint8)


def cached(path: Path) -> int:
    """Bytes of a file that the system's cache holds now, by mincore."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        first = ctypes.c_ubyte.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), flags
        )
        del first
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return sum(flag & 1 for flag in flags) * mmap.PAGESIZE
