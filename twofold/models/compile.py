"""Program: a Decoder written out as one list of stages that a team of threads runs without coming back to Python.

    embed ▸ [ norm ▸ qkv ▸ heads ▸ attention ▸ out ▸ (add, norm) ▸ gate·up ▸ down ] × layers ▸ norm     ▸ gather ▸ head
            x: the residual stream    h: a part's input    y, z: a part's output                          logits

The stages are the same kernels that `Decoder.forward` calls one at a time, on the same weights where they lie, so both
give the same bits; what is saved is Python between the layers, memory traffic, and waking the threads. Stages are
written once; what changes from step to step is read through one `Step`.

Shapes: T tokens of a step, R rows whose logits are wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from ..kernels import all_ops, native, stages
from ..quant.linear import QuantLinear
from .decoder import Decoder
from .write import Writer


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """A step's tokens: of each span its first position, how many tokens, and the blocks that hold its sequence.

    `slots` are those of the spans' adapters, from 1 on and 0 for none; left out where there are none.
    `types` are the tokens' types, all 0 when there are none.
    """

    ids: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    blocks: Sequence[Sequence[int]]
    slots: Sequence[int] = ()
    types: Sequence[int] = ()


def working_bytes(decoder: Decoder, tokens: int, rows: int) -> int:
    """What a program for this decoder works in, counted without taking any memory; the decoder may be a meta one."""
    with torch.device("meta"):
        writer = Writer(decoder, [stages.Cache() for _ in decoder.layers], stages.Step(), tokens, rows)
        writer.body(bool(writer.beside.slots))
        writer.head()
    return writer.nbytes


def why_not(decoder: Decoder, device: str | None = None) -> str:
    """What keeps a decoder from being compiled here, "" when nothing; then its layers run one kernel at a time.

    `device` is where a decoder that is still on torch's meta device will be.
    """
    if native.missing():
        return native.missing()
    if (device or decoder.device.type) != "cpu":
        return f"weights on {device or decoder.device}"
    if decoder.dtype not in (torch.float32, torch.bfloat16):
        return f"weights in {decoder.dtype}"
    for op in all_ops():
        if op.asked() not in (None, "native"):
            return f"{op.name} is to be served by {op.asked()}"
    if decoder.spec.embedding.project and decoder.spec.embedding.positions:
        return "learned positions behind a projection"
    if decoder.spec.embedding.types and isinstance(decoder.embed, QuantLinear):
        return "token types beside a quantized embedding"
    return ""


class Program:
    """A decoder compiled for at most `tokens` tokens and `rows` wanted rows a step, over caches of keys and values.

    `caches` holds one `stages.Cache` for each layer. Weights are read where they are: when a trainer changes them in
    place, the next step sees it. `why_not` says which decoders can be compiled.
    """

    def __init__(self, decoder: Decoder, caches: Sequence[stages.Cache], *, tokens: int, rows: int) -> None:
        library = native.library()
        assert library is not None, "see why_not"
        self._library, self.decoder, self.rows = library, decoder, rows
        self._step = stages.Step()
        writer = Writer(decoder, caches, self._step, tokens, rows)
        seated = writer.body(seated=True) if writer.beside.slots else []
        self._seated = self._cut(seated, writer.cuts)
        body = writer.body()
        self._body = self._cut(body, writer.cuts)
        self._written = (body, seated, writer.head())
        self._head = library.bind(self._written[-1])
        self._hidden_TD, self._logits_RV = _Top(writer.hidden_TD), _Top(writer.logits_RV)
        self._writer = writer  # keeps alive what the stages point at

    @property
    def nbytes(self) -> int:
        """Bytes that it works in, beside weights and cache."""
        return self._writer.nbytes

    def run(self, step: Spans) -> Tensor:
        """The step's last hidden states [T, D], final norm applied; the program's memory, good until the next step."""
        kept = self._fill(step)
        parts = self._seated if any(step.slots) else self._body
        if (stream := self.decoder.stream) is None:
            self._go(parts[0])
        else:
            for number, part in enumerate(parts, -1):
                with stream.layer(number):
                    self._go(part)
        del kept
        return self._hidden_TD.rows(len(step.ids))

    def finite(self) -> bytes:
        """For each token of the last step 1 when its hidden state is all finite, else 0."""
        return ctypes.string_at(self._writer.finite_T.data_ptr(), self._step.tokens)

    def logits(self, wanted: Sequence[int]) -> Tensor:
        """Logits [R, V] of some of the last step's tokens, at most `rows`; good until the next call."""
        rows = array("i", wanted)
        self._step.wanted, self._step.rows = len(wanted), rows.buffer_info()[0]
        self._go(self._head)
        return self._logits_RV.rows(len(wanted))

    def _cut(self, body: list[ctypes.Structure], cuts: list[int]) -> list[ctypes.Array[stages.Stage]]:
        """The body in one, or where layers come and go: what is before them, each layer, and what is after."""
        if self.decoder.stream is None:
            return [self._library.bind(body)]
        return [self._library.bind(body[a:b]) for a, b in pairwise((0, *cuts, len(body)))]

    def _go(self, part: ctypes.Array[stages.Stage]) -> None:
        self._library.run(part, torch.get_num_threads())

    def _fill(self, step: Spans) -> list[array[int]]:
        """Write the step's figures where the stages look for them; what is returned must outlive the run."""
        spans = zip(step.starts, step.counts)
        positions = array("i", chain.from_iterable(range(start, start + count) for start, count in spans))
        table = array("i")
        stride = max(map(len, step.blocks), default=0)
        for blocks in step.blocks:
            table.extend(blocks)
            table.extend((0,) * (stride - len(blocks)))
        first = array("i", accumulate(step.counts, initial=0))
        self._writer.beside.switch()
        if any(step.slots):
            self._writer.beside.seat(step.counts, step.slots)
        kept = [array("i", step.ids), positions, first, array("i", step.starts), table]
        now = self._step
        now.tokens, now.spans, now.table_stride = len(step.ids), len(step.starts), stride
        now.ids, now.positions, now.first, now.start, now.table = (numbers.buffer_info()[0] for numbers in kept)
        kept.append(array("i", step.types))
        now.kinds = kept[-1].buffer_info()[0] if step.types else None
        return kept


class _Top:
    """The first rows of a tensor. The view is kept while their number is the same, as it is from decode to decode:
    making one takes tens of microseconds when the weights have just gone through the caches.
    """

    def __init__(self, x: Tensor) -> None:
        self._x, self._view, self._count = x, x, len(x)

    def rows(self, count: int) -> Tensor:
        if count != self._count:
            self._view, self._count = self._x[:count], count
        return self._view
