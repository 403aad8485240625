"""HostPool: memory outside the device, by name: this machine's own, or files on its disk that are mapped.

    pool.allocate({"exp_avg.embed": ((4, 1024), fp32), ...})    reserved at once, each tensor at a page border
    pool.bring(tensor)     a thread reads its pages into memory
    pool.let_go(tensor)    they are the system's again: written when it likes, and nothing of this process any more

    address   |== in use ==|.............|== coming ==|...........|         resident is what was brought and not let go
    file      |============|=============|============|===========|

A tensor of a pool is a tensor like others; touching a page that was not brought brings it, and takes longer. A file has
no name: it is unlinked before anything is in it, so that nothing is left whatever the process dies of. Its room is
reserved before it is mapped, for a store to a mapped page that the disk has no room for would kill the process.

Who needs it: optimizer states, gradients and weights in training (ZeRO-Offload, Ren et al. 2021; ZeRO-Infinity,
Rajbhandari et al. 2021), and keys and values in serving.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import tempfile
import weakref
from bisect import bisect
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import CapacityError, ConfigError
from .pages import zeros

Kind = Literal["host", "disk"]
Wanted = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""

_POPULATE_READ, _POPULATE_WRITE = 22, 23  # Linux 5.14; an older one says no, and pages come when they are touched
_ARRIVED: Future[None] = Future()
_ARRIVED.set_result(None)


class HostPool:
    """Named tensors in this machine's memory ("host"; pinned where there is a CUDA device) or in files ("disk").

    Raises:
        ConfigError: "disk" without a directory, or one that is not there or may not be written to.
    """

    def __init__(self, kind: Kind = "host", directory: str | Path | None = None) -> None:
        self.kind = kind
        self.directory = _checked(directory) if kind == "disk" else None
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = 0
        self._file: _File | None = None
        self._thread: ThreadPoolExecutor | None = None

    def allocate(self, wanted: Wanted) -> dict[str, Tensor]:
        """Tensors of zeros by name; what is asked for together lies together, in this order.

        They stay good as long as they are held, also after the pool was closed.

        Raises:
            CapacityError: it does not fit; nothing is taken.
            ConfigError: a name is in use.
        """
        taken = sorted(wanted.keys() & self.tensors.keys())
        if taken:
            raise ConfigError(f"'{taken[0]}' is in this pool already")
        places: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in wanted.items():
            places[name] = size
            size += _paged(math.prod(shape) * dtype.itemsize)
        raw = self._room(size)
        fresh = {
            name: raw[places[name] : places[name] + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (shape, dtype) in wanted.items()
        }
        self.tensors |= fresh
        self.nbytes += size
        return fresh

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file of this pool."""
        return self._file is not None and self._file.span(tensor) is not None

    def bring(self, *tensors: Tensor, write: bool = False) -> Future[None]:
        """Have a thread read the pages of tensors or of parts of them; the future says when they are there.

        `write` says that they will be changed. Tensors that are not in a file of this pool are where they are.
        """
        spans = [span for tensor in tensors if self._file and (span := self._file.span(tensor))]
        if not spans or self._file is None:
            return _ARRIVED
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "pool")
        return self._thread.submit(_bring, self._file, spans, write)

    def let_go(self, *tensors: Tensor) -> None:
        """Give the pages of tensors or of parts of them back to the system; what is in them stays true."""
        for tensor in tensors:
            if self._file and (span := self._file.span(tensor)):
                self._file.let_go(*span[:2])

    def drop(self) -> None:
        """Wait until all is on the disk, and keep none of it in the system's cache."""
        if self._file:
            self._file.drop()

    def close(self) -> None:
        """Forget every tensor; the room is the system's again when the last one that is held is gone."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self.tensors.clear()
        self._file = None
        self.nbytes = 0

    def __enter__(self) -> HostPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _room(self, size: int) -> Tensor:
        if self.directory is not None and size:
            self._file = self._file or _File(self.directory)
            return self._file.more(size)
        try:
            if torch.cuda.is_available():
                return torch.zeros(size, dtype=torch.uint8, pin_memory=True)
            return zeros((size,), torch.uint8)
        except (MemoryError, RuntimeError) as error:
            raise CapacityError(f"this machine has no memory for a pool of {_shown(size)}: {error}") from None


class _File:
    """A file without a name that grows by ranges, each reserved on the disk and mapped while a tensor of it is held."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.size = directory, 0
        self._begins: list[int] = []  # addresses of ranges, rising, and where each ends and lies in the file
        self._ranges: list[tuple[int, int]] = []
        try:
            self._file = tempfile.TemporaryFile(dir=directory, prefix=".pool-", buffering=0)  # noqa: SIM115, it lives on
        except OSError as error:
            raise _no_room(directory, 0, error) from None

    def more(self, size: int) -> Tensor:
        """The next `size` bytes."""
        handle = self._file.fileno()
        disk = os.statvfs(self.directory)
        if size > disk.f_bavail * disk.f_frsize:  # asking would fill the disk up before it fails
            raise _no_room(self.directory, size, OSError(errno.ENOSPC, ""))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, self.size, size)
            else:
                os.truncate(handle, self.size + size)
            begin = _mapped(handle, self.size, size)
        except OSError as error:
            os.truncate(handle, self.size)
            raise _no_room(self.directory, size, error) from None
        memory = (ctypes.c_ubyte * size).from_address(begin)
        weakref.finalize(memory, _libc().munmap, begin, size).atexit = False
        at = bisect(self._begins, begin)
        self._begins.insert(at, begin)
        self._ranges.insert(at, (begin + size, self.size))
        self.size += size
        return torch.frombuffer(memory, dtype=torch.uint8)

    def span(self, tensor: Tensor) -> tuple[int, int, int] | None:
        """The pages under a tensor: address, bytes, and where they lie in the file; None when it lies elsewhere."""
        first = tensor.data_ptr()
        at = bisect(self._begins, first) - 1
        if at < 0 or first >= self._ranges[at][0]:
            return None
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        stop = _paged(first + tensor.numel() * tensor.element_size())
        return start, stop - start, self._ranges[at][1] + start - self._begins[at]

    def bring(self, start: int, size: int, place: int, write: bool) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), place, size, os.POSIX_FADV_WILLNEED)
            _libc().madvise(start, size, _POPULATE_WRITE if write else _POPULATE_READ)

    def let_go(self, start: int, size: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            _libc().madvise(start, size, mmap.MADV_DONTNEED)

    def drop(self) -> None:
        for begin, (end, _) in zip(self._begins, self._ranges):
            self.let_go(begin, end - begin)
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bring(file: _File, spans: list[tuple[int, int, int]], write: bool) -> None:
    for span in spans:
        file.bring(*span, write)


def _mapped(handle: int, place: int, size: int) -> int:
    """Where these bytes of a file are in memory now. Python's own mmap holds a file handle for each, and its lock."""
    begin = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, handle, place)
    if begin in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(begin)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = (address, size, number, number, number, ctypes.c_int64), address
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, number)
    return libc


def _checked(directory: str | Path | None) -> Path:
    if directory is None:
        raise ConfigError("a pool on disk needs a directory: name one on a fast disk with room")
    path = Path(directory)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory: make it, or name another for the pool's files")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} may not be written to: change its permissions, or name another directory")
    return path


def _no_room(directory: Path, size: int, error: OSError) -> CapacityError:
    what = f"{directory} has no room for a file of {_shown(size)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = os.statvfs(directory)
        free = _shown(room.f_bavail * room.f_frsize)
        return CapacityError(f"{what}, {free} are free: make room there, or name another directory")
    if error.errno == errno.EFBIG:
        return CapacityError(f"{what}: this process may not write files so large; raise its limit (ulimit -f)")
    return CapacityError(f"{what}: {error.strerror}")


def _paged(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _shown(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
