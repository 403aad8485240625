"""Sections: a decoder's tensors as one file has them, packed as they are served, a layer after another.

    page 0        a line that says what this is, padded
    section 0     embeddings, last norm, head: what is in no layer
    section 1     layer 0    qkv │ out │ gate_up │ down │ norms     each tensor at a line of the cache
    ...                                                             each section at a page

A layer is one run of bytes that can be read in whole pages, straight to where it is computed with. The checkpoint's
own file cannot be used so: its tensors begin anywhere, queries, keys and values lie apart, and what is quantized is in
other orders than the kernels read. So it is loaded once, tensor by tensor, into memory that is this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import CapacityError, CheckpointError
from ..platforms.direct import PAGE
from .decoder import Decoder

VERSION = 1
LINE = 64


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a section: the module that has it, its name there, and where in the section it begins."""

    place: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int
    is_parameter: bool

    def of(self, raw: Tensor) -> Tensor:
        """The tensor in the section's bytes."""
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        return raw[self.at : self.at + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Section:
    """Tensors that lie together: `nbytes` of the file from `begin` on, both whole pages."""

    begin: int
    nbytes: int
    parts: tuple[Part, ...]

    def put(self, decoder: Decoder, raw: Tensor) -> None:
        """Let these bytes be the decoder's tensors."""
        for part in self.parts:
            module, tensor = decoder.get_submodule(part.place), part.of(raw)
            if part.is_parameter:
                module._parameters[part.name] = nn.Parameter(tensor)
            else:
                module._buffers[part.name] = tensor


def sections(decoder: Decoder) -> list[Section]:
    """What is in no layer, and each layer, of a decoder that may be on the meta device."""
    found = [_section(PAGE, [named for named in _tensors(decoder, "") if not named[0].startswith("layers")])]
    for number, layer in enumerate(decoder.layers):
        found.append(_section(found[-1].begin + found[-1].nbytes, list(_tensors(layer, f"layers.{number}"))))
    return found


def _tensors(module: nn.Module, place: str) -> Iterator[tuple[str, str, Tensor, bool]]:
    for inner, part in module.named_modules():
        where = ".".join(filter(None, (place, inner)))
        for name, parameter in part.named_parameters(recurse=False):
            yield where, name, parameter, True
        for name, buffer in part.named_buffers(recurse=False):
            yield where, name, buffer, False


def _section(begin: int, tensors: list[tuple[str, str, Tensor, bool]]) -> Section:
    parts, at = [], 0
    for place, name, tensor, is_parameter in tensors:
        parts.append(Part(place, name, tensor.dtype, tuple(tensor.shape), at, is_parameter))
        at += -(-tensor.numel() * tensor.element_size() // LINE) * LINE
    return Section(begin, -(-at // PAGE) * PAGE, tuple(parts))


def size_of(found: list[Section]) -> int:
    """Bytes of the whole file."""
    return found[-1].begin + found[-1].nbytes


def identity(folder: Path, found: list[Section]) -> str:
    """What a file of sections was made of: the checkpoint's files as they stand now, and how they are packed."""
    files = sorted(p for pattern in ("config.json", "*.safetensors", "*.gguf") for p in folder.glob(pattern))
    stats = [(p.name, (st := p.resolve().stat()).st_size, st.st_mtime_ns) for p in files]
    return _digest([VERSION, _packing(found), stats])


def _packing(found: list[Section]) -> list[object]:
    return [[(p.place, p.name, str(p.dtype), p.shape, p.at) for p in section.parts] for section in found]


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]


def place_of(directory: Path, folder: Path, found: list[Section]) -> Path:
    """The file of a checkpoint in one packing; what the checkpoint holds today is in its first page."""
    folder = folder.resolve()
    return directory / f"{folder.name}-{_digest([str(folder), _packing(found)])}.weights"


def head(key: str, size: int) -> bytes:
    """The file's first page."""
    return json.dumps({"twofold": "weights", "of": key, "bytes": size}).encode().ljust(PAGE, b" ")


def is_made(path: Path, key: str, size: int) -> bool:
    """Whether the file is there and made of what the checkpoint holds now.

    Raises:
        CheckpointError: it is, and it is not whole.
    """
    try:
        with path.open("rb") as file:
            said, there = file.read(PAGE), os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if said[: len(said.rstrip())] != head(key, size).rstrip():
        return False
    if there != size:
        raise CheckpointError(f"{path} has {there} bytes and should have {size}: remove it, and it is made anew")
    return True


class Making:
    """A file of sections while it is made: nobody sees it before it is whole and on the disk.

    Raises:
        CapacityError: the disk has no room for it.
    """

    def __init__(self, path: Path, key: str, size: int) -> None:
        self.path, self.size = path, size
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".partial", dir=path.parent)
            self._file, self._name = os.fdopen(handle, "r+b", buffering=0), Path(name)
        except OSError as error:
            raise CapacityError(
                f"{path.parent} cannot take the streamed weights ({error.strerror}): name another with --offload-dir"
            ) from None
        try:
            room = os.statvfs(path.parent)
            if size > room.f_bavail * room.f_frsize:
                raise OSError(28, "no space left on it")
            os.posix_fallocate(handle, 0, size)  # a store to a mapped page without room would kill the process
            os.pwrite(handle, head(key, size), 0)
        except OSError as error:
            self.drop()
            raise CapacityError(
                f"{path.parent} has no room for {size / 2**20:,.0f} MiB of streamed weights ({error.strerror}): make "
                "room there, or name another with --offload-dir"
            ) from None

    def raw(self) -> Tensor:
        """All its bytes, mapped: what is stored there is in the file."""
        return torch.from_file(str(self._name), shared=True, size=self.size, dtype=torch.uint8)

    def finish(self) -> None:
        """It is whole: on the disk, out of the cache, under its name."""
        handle = self._file.fileno()
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(self._name, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._file.close()

    def drop(self) -> None:
        """It will not be."""
        self._name.unlink(missing_ok=True)
        self._file.close()
