"""Corpus: documents as ids on disk, memory-mapped, made once and kept by the hash of what they were made from.

folder/<hash>/train.ids     every document's ids, end to end        uint32
             /train.learn   1 where the id is to be learned         uint8
             /train.starts  where each document starts, and the end int64
             /valid.*       the same for the held-out documents
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..core import ConfigError
from .dataset import documents
from .tokenizer import Tokenizer
from .wording import Wording

if TYPE_CHECKING:
    from .chat import ChatTemplate

_FORMAT = b"twofold corpus 2"
_SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Corpus:
    """Documents end to end: ids [N], learn [N] (1: to be learned), starts [documents + 1]."""

    ids: npt.NDArray[Any]
    learn: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, encoded: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Corpus:
        """A corpus in memory from (ids, learn) of each document."""
        pairs = list(encoded)
        starts = np.cumsum([0, *(len(ids) for ids, _ in pairs)], dtype=np.int64)
        ids = np.array([token for tokens, _ in pairs for token in tokens], dtype=np.int64)
        learn = np.array([flag for _, flags in pairs for flag in flags], dtype=np.uint8)
        return cls(ids, learn, starts)

    def __len__(self) -> int:
        """How many documents."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])


@dataclass(frozen=True)
class Split:
    """What is learned, what is held out, and the hash of all that both were made from."""

    train: Corpus
    valid: Corpus
    fingerprint: str


def prepare(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    template: ChatTemplate | None = None,
    chat: bool = False,
    valid_fraction: float = 0.0,
) -> Split:
    """Tokenise `sources` into `folder`, or open what an earlier call made there from the same content.

    A source that is named several times is learned that many times, and validated once. `Wording` says how documents
    become ids: chats through `template`, and with `chat` prompts and completions that are text as well. Each document
    is read twice (hash, ids) and never kept, so sources may be larger than memory.

    Raises:
        ConfigError: a source that cannot be read, chats without a template, or no documents at all.
    """
    digest = hashlib.sha256(_FORMAT)
    for part in (tokenizer.serialized(), template.source if template else "", repr((valid_fraction, chat))):
        digest.update(hashlib.sha256(part.encode()).digest())
    count = 0
    for source, times in Counter(sources).items():
        for document in documents(source):
            flags = f"{document.key!r}{document.always_train}".encode()
            digest.update((hashlib.sha256(document.canonical()).digest() + hashlib.sha256(flags).digest()) * times)
            count += 1
    if not count:
        raise ConfigError(f"no documents in {', '.join(sources)}")
    fingerprint = digest.hexdigest()
    place = Path(folder) / fingerprint[:16]
    if not place.is_dir():
        _write(sources, Wording(tokenizer, template, chat=chat), place, valid_fraction)
    train, valid = (_open(place, split) for split in _SPLITS)
    return Split(train, valid, fingerprint)


def _write(sources: Sequence[str], wording: Wording, place: Path, valid_fraction: float) -> None:
    unfinished = place.with_name(f"{place.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    try:
        writers = [_Writer(unfinished, split) for split in _SPLITS]
        for source, times in Counter(sources).items():
            for document in documents(source):
                held_out = document.held_out(valid_fraction)
                ids, learn = wording.document(document, source)
                writers[held_out].add(ids, learn, times=1 if held_out else times)
        for writer in writers:
            writer.close()
        if not place.is_dir():
            unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _Writer:
    def __init__(self, folder: Path, split: str) -> None:
        self._ids: BinaryIO = (folder / f"{split}.ids").open("wb")
        self._learn: BinaryIO = (folder / f"{split}.learn").open("wb")
        self._starts_path = folder / f"{split}.starts"
        self._starts = [0]

    def add(self, ids: list[int], learn: list[bool], times: int) -> None:
        self._ids.write(np.array(ids, dtype=np.uint32).tobytes() * times)
        self._learn.write(np.array(learn, dtype=np.uint8).tobytes() * times)
        for _ in range(times):
            self._starts.append(self._starts[-1] + len(ids))

    def close(self) -> None:
        self._ids.close()
        self._learn.close()
        self._starts_path.write_bytes(np.array(self._starts, dtype=np.int64).tobytes())


def _open(place: Path, split: str) -> Corpus:
    starts = np.fromfile(place / f"{split}.starts", dtype=np.int64)
    ids = _mapped(place / f"{split}.ids", np.uint32)
    learn = _mapped(place / f"{split}.learn", np.uint8)
    if not len(starts) or len(ids) != starts[-1] or len(learn) != starts[-1]:
        raise ConfigError(f"the tokenised corpus in {place} is damaged: remove that folder, it is made again")
    return Corpus(ids, learn, starts)


def _mapped(path: Path, kind: type[np.generic]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
