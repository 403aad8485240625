"""DiskTier: blocks of the KV cache in files, found again after a restart and by other servers of the same model.

    DIRECTORY/<identity of the model>/<two digits>/<digest of the block>.kv

    one file   │ a line of magic, a line of JSON: model, block, its tokens │ the block's bytes │ blake2b of all before │

What a file must begin with is known to whoever asks for it, so the head is compared and never parsed; a file that is
torn, or of something else, is removed and computed again. Files appear by being renamed, so there are no half ones but
those of a crash of the machine. One thread writes behind the engine's back; several
read. All files under the directory, of whatever model, are together held to `most_bytes`: those that were used
longest ago go first, a tenth at once.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from ..core import ConfigError
from .blocks import Name
from .tiers import Content

log = logging.getLogger("twofold.engine")

QUEUE_BYTES = 64 << 20
"""What may wait to be written."""
READERS = 4
LOOK_SECONDS = 10.0
"""How often other servers' files are looked for."""
TOUCH_SECONDS = 600.0
"""How often the use of a block is noted in its file's date."""
REST_SECONDS = 10.0
"""How long nothing is written after a file could not be, and how long a file may take."""
STALE_SECONDS = 3600.0
CLOSE_SECONDS = 2.0
SUM = 16
_ONES = re.compile(r"[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{32}\.kv(?:\.[0-9]+-[0-9]+\.tmp)?")


class DiskTier:
    """Blocks of `block_bytes` bytes of the model `identity`, in files under a directory that the operator named.

    Raises:
        ConfigError: the directory cannot be made or written to, or has no room for one block by `most_bytes`.
    """

    name = "disk"

    def __init__(self, directory: str | Path, *, identity: str, block_bytes: int, most_bytes: int) -> None:
        self.root, self.identity, self.block_bytes, self.most_bytes = Path(directory), identity, block_bytes, most_bytes
        self.folder = self.root / identity
        self.errors = 0
        self.stored_bytes = 0
        self.held_bytes = 0
        self._index: dict[bytes, float] = {}  # digest -> when its use was last noted
        self._queued: set[bytes] = set()
        self._reading: WeakValueDictionary[bytes, Future[Content]] = WeakValueDictionary()
        self._seen: dict[str, int] = {}  # of each folder of two digits, its date when it was last listed
        self._lock = Lock()
        self._count = itertools.count()
        self._off = self._warned = False
        self._rest = self._look = self._moved = 0.0
        _ready(self.folder)
        if most_bytes < block_bytes + 4096:
            raise ConfigError(f"kv_offload_bytes is {most_bytes}, and one block has {block_bytes}: give more")
        self._writer = ThreadPoolExecutor(1, "kv-writer")
        self._readers = ThreadPoolExecutor(READERS, "kv-reader")
        self._list()
        self._writer.submit(self._guarded, self._trim)

    # ------------------------------------------------------------------------------------ what the engine asks
    def wants(self, name: Name, leaving: bool) -> bool:
        now = time.monotonic()
        noted = self._index.get(name[0])
        if noted is not None and not self._off and now - noted > TOUCH_SECONDS:
            self._index[name[0]] = now
            self._writer.submit(self._guarded, os.utime, self._path(name[0]))
        off = self._off or now < self._rest or self._hangs
        return noted is None and name[0] not in self._queued and not off

    @property
    def full(self) -> bool:
        queued = len(self._queued)
        return queued > 0 and (queued + 1) * self.block_bytes > QUEUE_BYTES and not self._hangs

    @property
    def _hangs(self) -> bool:
        """Whether the disk takes nothing any more: nobody waits for room in the queue then."""
        return bool(self._queued) and time.monotonic() - self._moved > REST_SECONDS

    def store(self, name: Name, content: memoryview) -> None:
        if not self.full and self.wants(name, leaving=False):
            self._moved = self._moved if self._queued else time.monotonic()
            self._queued.add(name[0])
            self._writer.submit(self._write, name, content)

    def lookup(self, name: Name) -> bool:
        now = time.monotonic()
        if now >= self._look and not self._off:
            self._look = now + LOOK_SECONDS
            self._writer.submit(self._guarded, self._list)
        return not self._off and name[0] in self._index

    def load(self, name: Name) -> Future[Content]:
        future = self._reading.get(name[0])
        if future is None:
            future = self._readers.submit(self._read, name)
            self._reading[name[0]] = future
        return future

    def forget(self) -> None:
        """Only the checkpoint's own weights have a name that outlives this process: with others the disk is left."""
        self._off = True
        self._index.clear()

    def close(self) -> None:
        self._off = True
        self._readers.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + CLOSE_SECONDS
        while self._queued and time.monotonic() < end:
            time.sleep(0.01)
        self._writer.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------ files
    def head(self, name: Name) -> bytes:
        """What the file of a block begins with."""
        tokens = array("i", name[1])
        about = {
            "format": 1,
            "chain": "blake2b-128 of parent and tokens",
            "model": self.identity,
            "block": name[0].hex(),
            "block_size": len(tokens),
            "bytes": self.block_bytes,
            "tokens": tokens.tolist(),
        }
        return b"twofold kv block\n" + json.dumps(about, separators=(",", ":")).encode() + b"\n"

    def _path(self, digest: bytes) -> Path:
        return self.folder / digest.hex()[:2] / f"{digest.hex()}.kv"

    def _write(self, name: Name, content: memoryview) -> None:
        path = self._path(name[0])
        try:
            if not path.exists():
                self._put(path, self.head(name), content)
            self._index[name[0]] = time.monotonic()
            if self.held_bytes > self.most_bytes:
                self._trim()
        except OSError as error:
            self._rest = time.monotonic() + REST_SECONDS
            self._trouble("could not be written", path, error)
        finally:
            self._moved = time.monotonic()
            self._queued.discard(name[0])

    def _put(self, path: Path, head: bytes, content: memoryview) -> None:
        beside = path.with_name(f"{path.name}.{os.getpid()}-{next(self._count)}.tmp")
        total = blake2b(head, digest_size=SUM)
        total.update(content)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
                for part in (head, content, total.digest()):
                    if file.write(part) != len(part):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise
        size = len(head) + content.nbytes + SUM
        with self._lock:
            self.stored_bytes += size
            self.held_bytes += size

    def _read(self, name: Name) -> Content:
        path = self._path(name[0])
        try:
            head = self.head(name)
            raw = bytearray(len(head) + self.block_bytes + SUM)
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                whole = size == len(raw) and file.readinto(raw) == size
            view = memoryview(raw)
            if whole and raw.startswith(head) and blake2b(view[:-SUM], digest_size=SUM).digest() == view[-SUM:]:
                return view[len(head) : -SUM]
            path.unlink(missing_ok=True)
            self._trouble("was torn or of something else, and is removed", path)
        except FileNotFoundError:
            pass  # another server needed its room
        except (OSError, MemoryError) as error:
            self._trouble("could not be read", path, error)
        self._index.pop(name[0], None)
        return None

    def _trouble(self, what: str, path: Path, error: BaseException | None = None) -> None:
        """Count it; say so once, for a broken disk breaks every block."""
        with self._lock:
            self.errors += 1
            said, self._warned = self._warned, True
        if not said:
            why = f": {error}" if error is not None else ""
            log.warning("%s %s%s; it is computed again, and what follows is only counted", path, what, why)

    def _guarded(self, what: Callable[..., object], *args: object) -> None:
        """Do something that a request does not wait for."""
        try:
            what(*args)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                self._trouble("could not be looked after", self.folder, error)

    # ------------------------------------------------------------------------------------ who else writes here
    def _list(self) -> None:
        """Learn which blocks of this model there are, from folders that changed since they were last listed."""
        if self._off:
            return
        now = time.monotonic()
        for entry in _entries(self.folder):
            changed = entry.stat().st_mtime_ns
            if not entry.is_dir() or self._seen.get(entry.name) == changed:
                continue
            there = {
                bytes.fromhex(file.name[:32])
                for file in _entries(entry.path)
                if re.fullmatch(r"[0-9a-f]{32}\.kv", file.name)
            }
            begin = bytes.fromhex(entry.name) if re.fullmatch("[0-9a-f]{2}", entry.name) else b"-"
            for digest in [one for one in list(self._index) if one.startswith(begin)]:
                if digest not in there and digest not in self._queued:
                    self._index.pop(digest, None)
            for digest in there:
                self._index.setdefault(digest, now - TOUCH_SECONDS)
            if time.time_ns() - changed > 10**9:  # else it may change again without a later date
                self._seen[entry.name] = changed

    def _trim(self) -> None:
        """Add up all files of all models, and remove the oldest when they are too many."""
        files, total = [], 0
        for path, kept in self._all():
            if path.endswith(".tmp"):
                if time.time() - kept.st_mtime > STALE_SECONDS:
                    os.unlink(path)
                continue
            files.append((kept.st_mtime_ns, kept.st_size, path))
            total += kept.st_size
        if total > self.most_bytes:
            for _, size, path in sorted(files):
                if total <= 0.9 * self.most_bytes:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                if path.startswith(str(self.folder)):
                    self._index.pop(bytes.fromhex(Path(path).stem), None)
                total -= size
        with self._lock:
            self.held_bytes = total

    def _all(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file that is a tier's, and none of anybody else's."""
        for model in _entries(self.root):
            for digits in _entries(model.path):
                for file in _entries(digits.path):
                    if _ONES.fullmatch(f"{model.name}/{digits.name}/{file.name}"):
                        with suppress(FileNotFoundError):
                            yield file.path, file.stat(follow_symlinks=False)


def _entries(path: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing when it is none."""
    try:
        with os.scandir(path) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _ready(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"kv_offload_dir: {folder} cannot be made: {error.strerror}; name another directory"
        ) from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"kv_offload_dir: {folder} may not be written to: change its permissions, or name another")
