"""The sampler's stage: each row's choice as a plain struct, its lists as arrays of int32, its answers beside them.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .sample import NOT_FINITE, NOTHING_LEFT, Choice, Chosen

REPORTS = {None: 0, "raw": 1, "processed": 2, "tempered": 4, "beam": 5}
GIVEN = 3
FAULTS = {1: NOT_FINITE, 2: NOTHING_LEFT}
UNKNOWN_ID = 3


class _Row(Structure):
    """`Choice` of `cpu/stages.h`, field by field."""

    _fields_ = (
        ("top_p", c_double),
        ("u", c_double),
        ("temperature", c_float),
        ("min_p", c_float),
        ("repetition", c_float),
        ("frequency", c_float),
        ("presence", c_float),
        ("top_k", c_int32),
        ("report", c_int32),
        ("allows", c_int32),
        ("biases", c_int32),
        ("bans", c_int32),
        ("seens", c_int32),
        ("counts", c_int32),
        ("allowed", c_void_p),
        ("bias_ids", c_void_p),
        ("banned", c_void_p),
        ("seen", c_void_p),
        ("counted", c_void_p),
        ("mask", c_void_p),
        ("bias", c_void_p),
        ("top_values", c_void_p),
        ("top_ids", c_void_p),
        ("tops", c_int32),
        ("fault", c_int32),
        ("token", c_int32),
        ("rank", c_int32),
        ("found", c_int32),
        ("logprob", c_float),
    )


class Sample(Structure):
    """A token for each row of logits."""

    _fields_ = (
        ("rows", c_void_p),
        ("vocab", c_int32),
        ("choice_size", c_int32),
        ("logits", c_void_p),
        ("stride", c_int64),
        ("choices", POINTER(_Row)),
    )


class _Lists:
    """Arrays that a stage points into, kept alive for as long as it may run."""

    def __init__(self) -> None:
        self._kept: list[array[int] | array[float] | bytes] = []

    def ids(self, ids: Iterable[int] | None) -> tuple[int, int]:
        """Address and length of a copy in int32."""
        return self._keep(array("i", ids)) if ids else (0, 0)

    def numbers(self, numbers: Iterable[float]) -> int:
        return self._keep(array("f", numbers))[0]

    def bits(self, mask: bytes, vocab: int) -> int:
        """Address of a mask, which has a bit for every id."""
        if len(mask) < -(-vocab // 32) * 4:
            raise IndexError(f"a mask of {8 * len(mask)} bits for a vocabulary of {vocab}")
        self._kept.append(mask)
        return ctypes.cast(ctypes.c_char_p(mask), c_void_p).value or 0

    def _keep(self, made: array[int] | array[float]) -> tuple[int, int]:
        self._kept.append(made)
        return made.buffer_info()


def choose_rows(logits_RV: Tensor, choices: Sequence[Choice]) -> list[Chosen | str]:
    """A token for each row of fp32 logits whose rows are contiguous.

    Raises:
        IndexError: a list of a choice holds an id that is not in the vocabulary.
    """
    rows, lists = (_Row * len(choices))(), _Lists()
    tops = _Tops([choice.tops if choice.report else 0 for choice in choices])
    for number, (row, choice) in enumerate(zip(rows, choices)):
        if number and choice is choices[number - 1]:
            rows[number] = rows[number - 1]
            continue
        row.temperature, row.top_p, row.u = choice.temperature, choice.top_p, choice.u
        row.top_k, row.min_p, row.report = max(0, choice.top_k), choice.min_p, REPORTS[choice.report]
        row.repetition, row.frequency, row.presence = choice.repetition, choice.frequency, choice.presence
        if choice.mask is not None:
            row.mask = lists.bits(choice.mask, logits_RV.shape[1])
        if choice.allowed is not None:
            row.allowed, row.allows = lists.ids(choice.allowed)
        if choice.bias:
            row.bias_ids, row.biases = lists.ids(choice.bias)
            row.bias = lists.numbers(choice.bias.values())
        if choice.banned:
            row.banned, row.bans = lists.ids(choice.banned)
        if choice.repetition != 1.0:
            row.seen, row.seens = lists.ids(choice.seen)
        if choice.frequency or choice.presence:
            row.counted, row.counts = lists.ids(choice.counted)
    tops.lend(rows)
    _run(logits_RV, rows)
    out: list[Chosen | str] = []
    for number, row in enumerate(rows):
        if row.fault:
            out.append(FAULTS[row.fault])
        elif choices[number].report is None:
            out.append(Chosen(row.token))
        else:
            out.append(Chosen(row.token, row.logprob, row.rank, tops.of(number, row.found)))
    return out


def score_rows(logits_RV: Tensor, ids: Sequence[int], tops: int) -> list[Chosen]:
    """The log-probability of each row's given token, its rank, and the `tops` best alternatives."""
    rows, found = (_Row * len(ids))(), _Tops([tops] * len(ids))
    for row, token in zip(rows, ids):
        row.report, row.token = GIVEN, token
    found.lend(rows)
    _run(logits_RV, rows)
    return [Chosen(row.token, row.logprob, row.rank, found.of(number, row.found)) for number, row in enumerate(rows)]


class _Tops:
    """Room for each row's alternatives."""

    def __init__(self, counts: list[int]) -> None:
        self.counts, room = counts, sum(counts)
        self.values, self.ids = array("f", bytes(4 * room)), array("i", bytes(4 * room))
        self.starts = [0] * len(counts)
        for row in range(1, len(counts)):
            self.starts[row] = self.starts[row - 1] + counts[row - 1]

    def lend(self, rows: ctypes.Array[_Row]) -> None:
        values, ids = self.values.buffer_info()[0], self.ids.buffer_info()[0]
        for row, start, count in zip(rows, self.starts, self.counts):
            if count:
                row.tops, row.top_values, row.top_ids = count, values + 4 * start, ids + 4 * start

    def of(self, row: int, found: int) -> tuple[tuple[int, float], ...]:
        place = slice(self.starts[row], self.starts[row] + found)
        return tuple(zip(self.ids[place], self.values[place]))


def _run(logits_RV: Tensor, rows: ctypes.Array[_Row]) -> None:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    count = ctypes.c_int32(len(rows))
    stage = Sample(
        rows=ctypes.addressof(count),
        vocab=logits_RV.shape[1],
        choice_size=ctypes.sizeof(_Row),
        logits=logits_RV.data_ptr(),
        stride=logits_RV.stride(0),
        choices=rows,
    )
    library.run([stage], torch.get_num_threads() if len(rows) > 1 else 1)
    if any(row.fault == UNKNOWN_ID for row in rows):
        raise IndexError(f"a choice names an id outside of the vocabulary, 0 to {logits_RV.shape[1] - 1}")
