"""Files: what clients upload and what batches write, in one folder, found by id and by their owner alone.

    folder/files/file-ID.json      who owns it and what it is called
    folder/files/file-ID.data      its bytes; put there last and at once, so that a file is whole or not there
    folder/batches/batch-ID...     of job.py

Names that clients send are never part of a path.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ...core import CapacityError, ConfigError
from ..config import Limits
from ..errors import HttpError
from .shapes import FileObject


class Kept(msgspec.Struct):
    """What is written of a file beside its bytes."""

    owner: str
    file: FileObject


class Files:
    """`folder` None means a private one that goes with this server."""

    def __init__(self, folder: Path | None, limits: Limits) -> None:
        self.limits = limits
        self._temporary: str | None = None
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="twofold-"))
            self._temporary = str(folder)
        self.folder = folder
        self.files = folder / "files"
        self.batches = folder / "batches"
        try:
            for each in (self.files, self.batches):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"files cannot be kept in {folder} ({error.strerror}): choose another --files-dir"
            ) from None
        self._kept: dict[str, Kept] = {}
        self._bytes = 0
        self._load()

    def close(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _load(self) -> None:
        found = []
        for path in self.files.glob("*.json"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                kept = msgspec.json.decode(path.read_bytes(), type=Kept)
                if kept.file.id == path.stem and self.data(kept.file.id).is_file():
                    found.append(kept)
        for kept in sorted(found, key=lambda kept: kept.file.created_at):
            self._keep(kept)
        for path in self.files.iterdir():  # what an upload or a deletion left behind when the server ended
            if path.stem not in self._kept:
                path.unlink(missing_ok=True)

    def data(self, name: str) -> Path:
        return self.files / f"{name}.data"

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writing]:
        """A new file that is being written; it is gone again unless it is kept."""
        self._drop_old()
        if len(self._kept) >= self.limits.files:
            raise CapacityError(f"{len(self._kept)} files are kept, no more fit: delete some")
        writing = Writing(self)
        try:
            yield writing
        finally:
            writing.close()

    def room(self) -> int:
        """Bytes that may still be kept."""
        return self.limits.files_bytes - self._bytes

    def adopt(self, path: Path, owner: str, file: FileObject) -> None:
        """Keep what already lies at `path` as the bytes of `file`; the file moves."""
        kept = Kept(owner, file)
        write_whole(self.files / f"{file.id}.json", msgspec.json.encode(kept))
        os.replace(path, self.data(file.id))
        self._keep(kept)

    def has(self, name: str) -> bool:
        return name in self._kept

    def get(self, owner: str, name: str, param: str | None = None, status: int = 404) -> FileObject:
        """The file called `name`; an error when there is none of this owner's."""
        self._drop_old()
        kept = self._kept.get(name)
        if kept is None or kept.owner != owner:
            raise HttpError(status, f"no file '{name:.80}' is kept: see /v1/files", param=param, code="file_not_found")
        return kept.file

    def listing(self, owner: str) -> list[FileObject]:
        """This owner's files, newest first."""
        self._drop_old()
        return [kept.file for kept in reversed(self._kept.values()) if kept.owner == owner]

    def delete(self, name: str) -> None:
        kept = self._kept.pop(name)
        self._bytes -= kept.file.bytes
        for path in (self.files / f"{name}.json", self.data(name)):
            path.unlink(missing_ok=True)

    def _keep(self, kept: Kept) -> None:
        self._kept[kept.file.id] = kept
        self._bytes += kept.file.bytes

    def _drop_old(self) -> None:
        now = time.time()
        old = [name for name, kept in self._kept.items() if (kept.file.expires_at or now) < now]
        for name in old:
            self.delete(name)


class Writing:
    """A file on its way to the disk."""

    def __init__(self, files: Files) -> None:
        self.id = new_id()
        self.size = 0
        self._files = files
        self._path = files.data(self.id).with_suffix(".part")
        self._stream = self._path.open("wb")

    def write(self, data: bytes) -> None:
        """Add bytes; HttpError 413 when the file, or all files together, become too large."""
        self.size += len(data)
        if self.size > self._files.limits.file_bytes:
            raise HttpError(413, f"a file has at most {self._files.limits.file_bytes} bytes", param="file")
        if self.size > self._files.room():
            raise HttpError(413, "all files together have become too large: delete some", param="file")
        self._stream.write(data)

    def keep(self, owner: str, filename: str, purpose: str, expires_after: int | None = None) -> FileObject:
        self._stream.close()
        now = int(time.time())
        file = FileObject(id=self.id, bytes=self.size, created_at=now, filename=filename, purpose=purpose)
        file.expires_at = None if expires_after is None else now + expires_after
        self._files.adopt(self._path, owner, file)
        return file

    def close(self) -> None:
        self._stream.close()
        self._path.unlink(missing_ok=True)


def new_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def write_whole(path: Path, data: bytes) -> None:
    """Replace a small file at once, so that it is never half of anything."""
    part = path.with_suffix(".new")
    with part.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
