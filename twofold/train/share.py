"""How a step's batch is divided: the same number of micro-batches on every rank, each of whole sequences.

    batch     │ seq │ seq │ seq │ seq │ seq │ seq │ seq │      2 ranks, 2 micro-batches each
    parts     │    0      │    1      │   2       │    3  │
    ranks     │          rank 0       │      rank 1       │

Every rank makes the whole batch (it is a function of its number) and takes its own part, so nothing is sent, and all
know the step's number of targets. Where sequences are `bound` (pairs), a unit of them takes the place of a sequence.
"""

from __future__ import annotations

import torch

from ..data import Batch
from .loss import IGNORE


def share(batch: Batch, ranks: int, rank: int, tokens: int | None) -> list[Batch]:
    """This rank's micro-batches: each at most `tokens` long where sequences allow.

    A part that no sequence falls into is one token with nothing to learn, for ranks reduce together.
    """
    if ranks == 1:
        return cut(batch, tokens)
    lengths = batch.units()
    each = max(1, -(-len(batch.ids_T) // (ranks * tokens))) if tokens else 1
    spans = _spans(lengths, ranks * each)
    while tokens and each < len(lengths) and any(sum(lengths[a:b]) > tokens and b - a > 1 for a, b in spans):
        each += 1
        spans = _spans(lengths, ranks * each)
    return [_piece(batch, first, last) for first, last in spans[rank * each : (rank + 1) * each]]


def cut(batch: Batch, tokens: int | None) -> list[Batch]:
    """A batch as micro-batches of whole sequences, each of at most `tokens` tokens (or one longer unit)."""
    if tokens is None or len(batch.ids_T) <= tokens:
        return [batch]
    parts: list[Batch] = []
    first, size = 0, 0
    units = batch.units()
    for place, length in enumerate(units):
        if size and size + length > tokens:
            parts.append(_piece(batch, first, place))
            first, size = place, 0
        size += length
    return [*parts, _piece(batch, first, len(units))]


def _spans(lengths: tuple[int, ...], parts: int) -> list[tuple[int, int]]:
    """Units in order as `parts` runs of about equal length: each goes where its middle falls."""
    total, done = sum(lengths), 0
    owners = []
    for length in lengths:
        owners.append(min(parts - 1, (2 * done + length) * parts // (2 * total)))
        done += length
    spans, at = [], 0
    for part in range(parts):
        end = at
        while end < len(owners) and owners[end] == part:
            end += 1
        spans.append((at, end))
        at = end
    return spans


def _piece(batch: Batch, first: int, last: int) -> Batch:
    """Units first to last."""
    if first == last:
        return nothing(batch)
    first, last = first * batch.bound, last * batch.bound
    start = sum(batch.lengths[:first])
    tokens = slice(start, start + sum(batch.lengths[first:last]))
    return Batch(
        ids_T=batch.ids_T[tokens],
        targets_T=batch.targets_T[tokens],
        lengths=batch.lengths[first:last],
        first=start,
        beside={name: value[tokens] for name, value in batch.beside.items()},
        bound=batch.bound,
    )


def nothing(batch: Batch) -> Batch:
    """One token with nothing to learn."""
    return Batch(
        ids_T=batch.ids_T[:1],
        targets_T=torch.tensor([IGNORE]),
        lengths=(1,),
        padding=1,
        beside={name: torch.zeros_like(value[:1]) for name, value in batch.beside.items()},
        bound=batch.bound,
    )
