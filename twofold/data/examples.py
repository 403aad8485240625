"""Prompts with completions as ids (`wording.py`), cut to their limits and kept end to end.

They stay in memory, at 5 bytes a token: good for some hundreds of millions of tokens. They are tokenised at each start.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..core import ConfigError
from .corpus import Corpus
from .dataset import Document
from .preference import judgements, preferences
from .wording import Example, Wording

T = TypeVar("T")
Rows = Callable[[str], Iterator[tuple[Document, list[Example], float]]]
"""A source to its rows: where each stands, its examples and what is said of them."""


@dataclass(frozen=True)
class Parted(Generic[T]):
    """What is trained on, what is held out, and the hash of both."""

    train: T
    valid: T
    fingerprint: str


@dataclass
class Counts:
    """What became of the rows: how many lost something to `Limits`, and how many were left out."""

    rows: int = 0
    cut_prompts: int = 0
    cut_completions: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.dropped} dropped, {self.cut_prompts} prompts cut, "
            f"{self.cut_completions} completions cut"
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long prompts and completions may be, in tokens, and what becomes of longer ones."""

    seq_len: int = 1024
    """Prompt and completion together."""
    max_prompt: int | None = None
    max_completion: int | None = None
    too_long: Literal["cut", "drop"] = "cut"
    """cut: a prompt keeps its end and a completion its beginning, as TRL's DPO has it; drop: the row is left out, as
    TRL's reward trainer has it. Where a prompt leaves no room for a completion, the row is left out anyway."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_prompt", "max_completion"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")

    def prompt(self, ids: list[int], counts: Counts) -> list[int] | None:
        """A prompt alone within limits, None when it is dropped."""
        counts.rows += 1
        long = self.max_prompt is not None and len(ids) > self.max_prompt
        if not ids or (long and self.too_long == "drop") or (not long and len(ids) > self.seq_len):
            counts.dropped += 1
            return None
        counts.cut_prompts += long
        return ids[-self.max_prompt :] if long and self.max_prompt else ids

    def all(self, examples: Sequence[Example], counts: Counts) -> list[Example]:
        """The examples of one row within limits; none of them when one must be dropped."""
        counts.rows += 1
        kept = [self._one(example) for example in examples]
        changed = [
            (len(b.prompt) < len(a.prompt), len(b.completion) < len(a.completion)) for a, b in zip(examples, kept)
        ]
        useless = any(not any([*example.learn][not example.prompt :]) for example in kept)
        if useless or (self.too_long == "drop" and any(map(any, changed))):
            counts.dropped += 1
            return []
        counts.cut_prompts += any(prompt for prompt, _ in changed)
        counts.cut_completions += any(completion for _, completion in changed)
        return kept

    def _one(self, example: Example) -> Example:
        most = self.max_prompt if self.max_prompt is not None else len(example.prompt)
        prompt = example.prompt[max(0, len(example.prompt) - most) :]
        room = max(0, self.seq_len - len(prompt))
        room = min(room, self.max_completion) if self.max_completion is not None else room
        return Example(prompt, example.completion[:room], example.learn[:room])


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples end to end: document d of `corpus` is a prompt and, from `answers[d]` on, its completion.

    Of preferences, documents 2k and 2k + 1 are the chosen and the rejected one of pair k. `values` [documents] float32:
    the pair's margin, or 1 for a good completion and 0 for a bad one.
    """

    corpus: Corpus
    answers: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    limits: Limits
    counts: Counts

    def __len__(self) -> int:
        return len(self.corpus)

    def digest(self) -> bytes:
        """A hash of every id, mask and value."""
        corpus = self.corpus
        parts = (corpus.ids, corpus.learn, corpus.starts, self.answers, self.values)
        return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).digest()


def read_preferences(
    sources: Sequence[str], wording: Wording, limits: Limits, *, valid_fraction: float = 0.0
) -> Parted[Examples]:
    """Preferences as pairs of examples, chosen first; a row is kept or dropped with both of its completions.

    Raises:
        ConfigError: a source that cannot be read, a row that is no preference, or messages without a chat template.
    """

    def rows(source: str) -> Iterator[tuple[Document, list[Example], float]]:
        for document, row in preferences(source):
            with document.named(source):
                pair = [wording.example(row.prompt, end, row.tools) for end in (row.chosen, row.rejected)]
            yield document, pair, row.margin

    return _read(sources, rows, limits, valid_fraction)


def read_judged(
    sources: Sequence[str], wording: Wording, limits: Limits, *, valid_fraction: float = 0.0
) -> Parted[Examples]:
    """Judged completions as examples; preferences among the rows are taken apart, the chosen one good.

    Raises:
        ConfigError: a source that cannot be read, a row without judgement, or messages without a chat template.
    """

    def rows(source: str) -> Iterator[tuple[Document, list[Example], float]]:
        for document, row in judgements(source):
            with document.named(source):
                example = wording.example(row.prompt, row.completion, row.tools)
            yield document, [example], float(row.good)

    return _read(sources, rows, limits, valid_fraction)


def _read(sources: Sequence[str], rows: Rows, limits: Limits, valid_fraction: float) -> Parted[Examples]:
    """Both sides of every source; one that is named twice is learned twice and validated once."""
    both = _Writer(limits), _Writer(limits)
    for place, source in enumerate(sources):
        for document, examples, value in rows(source):
            held_out = document.held_out(valid_fraction)
            if not (held_out and source in sources[:place]):
                both[held_out].add(examples, value)
    train, valid = (writer.done() for writer in both)
    return Parted(train, valid, hashlib.sha256(train.digest() + valid.digest()).hexdigest())


class _Writer:
    def __init__(self, limits: Limits) -> None:
        self._limits, self._counts = limits, Counts()
        self._ids, self._learn, self._values = array("I"), bytearray(), array("f")
        self._starts, self._answers = array("q", [0]), array("q")

    def add(self, examples: Sequence[Example], value: float) -> None:
        for example in self._limits.all(examples, self._counts):
            self._ids.extend(example.prompt + example.completion)
            self._learn += bytes(len(example.prompt)) + bytes(example.learn)
            self._answers.append(self._starts[-1] + len(example.prompt))
            self._starts.append(len(self._ids))
            self._values.append(value)

    def done(self) -> Examples:
        corpus = Corpus(
            np.array(self._ids, dtype=np.uint32),
            np.frombuffer(bytes(self._learn), dtype=np.uint8),
            np.array(self._starts, dtype=np.int64),
        )
        return Examples(
            corpus=corpus,
            answers=np.array(self._answers, dtype=np.int64),
            values=np.array(self._values, dtype=np.float32),
            limits=self._limits,
            counts=self._counts,
        )
