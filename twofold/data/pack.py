"""Packing: documents on one flat token axis, without padding; a loader whose whole state is one integer.

    documents     AAAAAAAA  BBB  CCCCC  DD           each loses its last id, which is only ever a target
    pieces        AAAA AAAA BBB  CCCC C DD           none longer than seq_len
    an epoch      DD AAAA C BBB AAAA CCCC            a permutation keyed by (seed, epoch)
    batches       |DD AAAA|C BBB AA|AA CCCC|...      the epochs end to end, cut every tokens_per_batch

Every piece (and each part of one that a border cuts) is its own sequence: no token sees another document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core import ConfigError
from .corpus import Corpus
from .order import Order

IGNORE = -100
NOBODY = 1 << 62
"""The place of a token that is in no step's batch."""


@dataclass(frozen=True)
class Batch:
    """Whole sequences end to end on T tokens.

    `ids_T` int64 [T]; `targets_T` int64 [T], the id that follows each, -100 where there is nothing to learn; `lengths`
    of the sequences, summing to T. `beside` holds what else is known of each token, [T, ...] by name: a margin, an
    advantage. `bound` neighbouring sequences stay in one micro-batch: 2 for pairs. Of a part of a step's batch, `first`
    is where in it the part begins; the last `padding` tokens are nobody's, and every `beside` is 0 there.
    """

    ids_T: Tensor
    targets_T: Tensor
    lengths: tuple[int, ...]
    first: int = 0
    padding: int = 0
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    bound: int = 1

    @property
    def own(self) -> int:
        """How many sequences are somebody's, whole units of `bound`; what lies behind them is padding."""
        left, count = len(self.ids_T) - self.padding, 0
        while left > 0:
            left -= self.lengths[count]
            count += 1
        return count

    def units(self) -> tuple[int, ...]:
        """Tokens of each run of `bound` sequences."""
        step = self.bound
        return tuple(sum(self.lengths[start : start + step]) for start in range(0, len(self.lengths), step))

    def places(self) -> Tensor:
        """The place of each token in its step's batch, int64 [T]; NOBODY for padding."""
        places_T = torch.arange(self.first, self.first + len(self.ids_T))
        places_T[len(places_T) - self.padding :] = NOBODY
        return places_T


class PackedLoader:
    """Batches of exactly `tokens_per_batch` tokens by number: `batch(i)` is a pure function of the corpus, the
    settings and i, so a loader's state is one integer.

    Raises:
        ConfigError: the corpus holds nothing to learn, or a size is not positive.
    """

    def __init__(
        self, corpus: Corpus, *, seq_len: int, tokens_per_batch: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        if seq_len < 1 or tokens_per_batch < 1:
            raise ConfigError(f"seq_len ({seq_len}) and tokens_per_batch ({tokens_per_batch}) must be 1 or more")
        self._corpus, self._batch_tokens = corpus, tokens_per_batch
        self._starts, self._lengths = _pieces(corpus, seq_len)
        self.tokens = int(self._lengths.sum())
        """Tokens of one epoch."""
        if not self.tokens:
            raise ConfigError("the corpus is empty: no document of two tokens or more (is too much held out?)")
        self._order = Order(len(self._lengths), seed=seed, shuffle=shuffle)
        self._ends: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Batches that one epoch takes, the last perhaps with tokens of the next."""
        return -(-self.tokens // self._batch_tokens)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, from 0 on without end."""
        first = index * self._batch_tokens
        return self._cut(first, first + self._batch_tokens)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """The first epoch's batches, at most `limit`; each token once, so the last batch may be short."""
        for index in range(min(len(self), limit if limit is not None else len(self))):
            first = index * self._batch_tokens
            yield self._cut(first, min(first + self._batch_tokens, self.tokens))

    def documents(self, index: int) -> list[int]:
        """The numbers of the corpus's documents that a batch has tokens of, rising."""
        first = index * self._batch_tokens
        starts = [start for start, _ in self._spans(first, first + self._batch_tokens)]
        return sorted({int(n) - 1 for n in np.searchsorted(self._corpus.starts, starts, side="right")})

    def _spans(self, first: int, last: int) -> list[tuple[int, int]]:
        """Where in the corpus the tokens first to last of the epochs end to end are: (start, size) of each sequence."""
        spans: list[tuple[int, int]] = []
        place = first
        while place < last:
            order, ends = self._epoch(place // self.tokens)
            within = place % self.tokens
            turn = int(np.searchsorted(ends, within, side="right"))
            piece = order[turn]
            done = within - int(ends[turn] - self._lengths[piece])
            size = min(int(self._lengths[piece]) - done, last - place)
            start = int(self._starts[piece]) + done
            spans.append((start, size))
            place += size
        return spans

    def _cut(self, first: int, last: int) -> Batch:
        """The tokens first to last of the epochs end to end."""
        spans = self._spans(first, last)
        where = np.concatenate([np.arange(start, start + size) for start, size in spans])
        ids, following = self._take(where), self._take(where + 1)
        learned = torch.from_numpy(self._corpus.learn[where + 1].astype(bool))
        targets = torch.where(learned, following, IGNORE)
        return Batch(ids, targets, tuple(size for _, size in spans))

    def _take(self, where: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(self._corpus.ids[where].astype(np.int64))

    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The order of the pieces in an epoch, and the running sum of their lengths in that order."""
        order = self._order.epoch(epoch)
        if epoch not in self._ends:
            self._ends = {key: ends for key, ends in self._ends.items() if key == epoch - 1}
            self._ends[epoch] = np.cumsum(self._lengths[order])
        return order, self._ends[epoch]


def _pieces(corpus: Corpus, seq_len: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Start and length of every piece of every document that has something to learn."""
    starts, lengths = [], []
    for first, end in zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist()):
        for start in range(first, end - 1, seq_len):
            starts.append(start)
            lengths.append(min(seq_len, end - 1 - start))
    return np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)
