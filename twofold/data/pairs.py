"""Batches of examples by number: pairs for preferences, single ones with their judgement, without padding.

    PairLoader       │ chosen │ rejected │ chosen │ rejected │ ...      bound = 2, beside["margin"]
    UnpairedLoader   │ example │ example │ ...                          beside["label"]
      mismatched     │ prompt 0, completion n-1 │ prompt 1, completion 0 │ ...     what KTO takes its KL baseline from

`batch(i)` is a pure function of the examples, the settings and i. An example of n ids is n - 1 tokens, for its last id
is only ever a target; with `whole` it is n, the last without a target: a reward model reads its score there.

Shapes: T tokens of a batch, S tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..core import ConfigError
from .examples import Examples
from .order import Order
from .pack import IGNORE, Batch

Array = npt.NDArray[np.int64]


class PairLoader:
    """`size` preferences a batch, as sequences chosen, rejected, chosen, rejected ...; `beside["margin"]` fp32 [T].

    Raises:
        ConfigError: no preferences, or `size` is not positive.
    """

    def __init__(
        self, examples: Examples, size: int, *, seed: int = 0, shuffle: bool = True, whole: bool = False
    ) -> None:
        _positive(size)
        self._examples, self._size, self._whole = examples, size, whole
        self._order = Order(len(examples) // 2, seed=seed, shuffle=shuffle)

    def __len__(self) -> int:
        """Batches that one epoch takes, the last perhaps with pairs of the next."""
        return -(-self._order.size // self._size)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, from 0 on without end."""
        return self._make(self._order.take(index * self._size, (index + 1) * self._size))

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        """The first epoch's batches, at most `limit`; each pair once, so the last batch may be short."""
        for places in _once(self._order, self._size, limit):
            yield self._make(places)

    def _make(self, pairs: Sequence[int]) -> Batch:
        documents = [place for pair in pairs for place in (2 * pair, 2 * pair + 1)]
        pieces = [_document(self._examples, place) for place in documents]
        return _batch(pieces, self._whole, {"margin": self._examples.values[documents]}, bound=2)


class UnpairedLoader:
    """`size` judged examples a batch; `beside["label"]` fp32 [T]: 1 for a good completion, 0 for a bad one.

    Raises:
        ConfigError: no examples, or `size` below 2: the KL baseline takes a neighbour's completion.
    """

    def __init__(self, examples: Examples, size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if size < 2:
            raise ConfigError(f"a batch of judged completions must have 2 or more, not {size}: raise it")
        self._examples, self._size = examples, size
        self._order = Order(len(examples), seed=seed, shuffle=shuffle)

    def __len__(self) -> int:
        """Batches that one epoch takes, the last perhaps with examples of the next."""
        return -(-self._order.size // self._size)

    def batch(self, index: int) -> Batch:
        """Batch number `index`, from 0 on without end."""
        return self._matched(self._places(index))

    def mismatched(self, index: int) -> Batch:
        """The same batch with completions moved on by one: each prompt with the completion of the one before it.

        Example j has the completion of j - 1, the first that of the last (Ethayarajh et al. 2024, as TRL has it); where
        the two together are longer than a sequence may be, the completion loses its end.
        """
        return self._moved(self._places(index))

    def once(self, limit: int | None = None) -> Iterator[tuple[Batch, Batch]]:
        """(batch, mismatched) of the first epoch, at most `limit`; each example once, so the last may be short."""
        for places in _once(self._order, self._size, limit):
            yield self._matched(places), self._moved(places)

    def _places(self, index: int) -> list[int]:
        return self._order.take(index * self._size, (index + 1) * self._size)

    def _matched(self, places: Sequence[int]) -> Batch:
        pieces = [_document(self._examples, place) for place in places]
        return _batch(pieces, False, {"label": self._examples.values[list(places)]})

    def _moved(self, places: Sequence[int]) -> Batch:
        others = [places[-1], *places[:-1]]
        return _batch([_crossed(self._examples, place, other) for place, other in zip(places, others)], False, {})


def _once(order: Order, size: int, limit: int | None) -> Iterator[list[int]]:
    count = -(-order.size // size)
    for index in range(min(count, limit if limit is not None else count)):
        yield order.take(index * size, min((index + 1) * size, order.size))


def _document(examples: Examples, place: int) -> tuple[Array, Array]:
    """Ids and targets [S] of one example, the last id among them: its target is IGNORE."""
    start, end = examples.corpus.starts[place : place + 2]
    return _learned(examples.corpus.ids[start:end], examples.corpus.learn[start:end])


def _crossed(examples: Examples, place: int, other: int) -> tuple[Array, Array]:
    """As `_document`, of one example's prompt and another's completion."""
    corpus = examples.corpus
    asked = slice(corpus.starts[place], examples.answers[place])
    room = max(1, examples.limits.seq_len - int(asked.stop - asked.start))
    answer = slice(examples.answers[other], min(corpus.starts[other + 1], examples.answers[other] + room))
    ids = np.concatenate((corpus.ids[asked], corpus.ids[answer]))
    return _learned(ids, np.concatenate((corpus.learn[asked], corpus.learn[answer])))


def _learned(ids: npt.NDArray[np.uint32], learn: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    following = np.append(ids[1:].astype(np.int64), IGNORE)
    return ids.astype(np.int64), np.where(np.append(learn[1:], 0) == 1, following, IGNORE)


def _batch(
    pieces: Sequence[tuple[Array, Array]], whole: bool, values: Mapping[str, npt.NDArray[np.float32]], bound: int = 1
) -> Batch:
    """Sequences end to end; `values`, one for each sequence, stand beside every token of it."""
    ends = [len(ids) if whole else len(ids) - 1 for ids, _ in pieces]
    sizes = torch.tensor(ends)
    return Batch(
        ids_T=torch.from_numpy(np.concatenate([ids[:end] for (ids, _), end in zip(pieces, ends)])),
        targets_T=torch.from_numpy(np.concatenate([targets[:end] for (_, targets), end in zip(pieces, ends)])),
        lengths=tuple(ends),
        beside={name: torch.from_numpy(value).repeat_interleave(sizes) for name, value in values.items()},
        bound=bound,
    )


def _positive(size: int) -> None:
    if size < 1:
        raise ConfigError(f"a batch must have 1 pair or more, not {size}")
