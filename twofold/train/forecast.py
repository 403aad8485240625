"""Forecast: the bytes that one rank will hold, from shapes alone, before anything starts.

    between steps   weights and what the rule keeps                             "kept"
    a step is walked through, and the moment with the most bytes is its peak:
      head          a chunk of logits and the head's gradient; what every layer keeps for backward
      layer i       what layers 0 to i keep, gradients on their way, layer i gathered and i-1 on its way,
                    layer i+1's gradient being reduced
      root          the embedding's gradient, then the reduction of all that is in no layer
      update        the slices of gradients, weights and states

FSDP2 cuts dimension 0 into equal parts, the last ones padded: `Group.shard` counts what the first rank holds, which is
the most. Gathered weights are a copy, even where a group has one rank. Gradients are reduced in fp32. What Twofold's
own autograd functions keep is in `held.py`; on the CPU activations are fp32 whatever the weights are. Rajbhandari et
al. 2020 count 16Ψ bytes and leave activations, gathered copies and buffers to the reader: here they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..models.cuts import local_spec
from ..models.decoder import Decoder
from ..models.spec import Gated, LayerSpec, Mixture, ModelSpec, Plain, Rope
from ..parallel import Layout
from .held import layer_numbers
from .loss import CHUNK_NUMBERS, CHUNK_ROWS
from .policies import Policy

FULL = 4
"""Bytes of a number in fp32: masters, states, sums of gradients."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank does in a step: `parts` micro-batches of `tokens`, and how it keeps its numbers.

    `size` and `act` are the bytes of a weight as it is multiplied by and of an activation; `states` how many numbers
    the rule keeps of each weight; `flight` how many micro-batches a pipeline has begun before it ends the first.
    """

    tokens: int
    parts: int = 1
    size: int = 4
    act: int = 4
    states: int = 2
    policies: tuple[Policy, ...]
    flight: int = 1
    feedback: bool = False
    """comm = "onebit" remembers what rounding lost: a whole gradient in fp32."""
    trained: float = 1.0
    """With adapters, their numbers for each of the model's, which has no gradients and states then."""
    beside: int = 0
    """Bytes of a model that is only read: a draft head's."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How parameters are divided: over `ranks`, by `stage`, `copies` of all; FSDP2 divides only where there are any."""

    stage: int = 0
    ranks: int = 1
    copies: int = 1

    @classmethod
    def of(cls, layout: Layout, in_place: bool) -> Cut:
        """A layout's; with fp32 gradients that stay `in_place`, stage 0 is a decoder like any (`replicas.py`)."""
        whole = in_place and layout.stage == 0 and layout.zero == layout.pp == layout.ep == 1
        return cls(stage=layout.stage, ranks=layout.zero, copies=1 if whole else layout.replicate)

    @property
    def divided(self) -> bool:
        return self.ranks * self.copies > 1


class Group(NamedTuple):
    """Parameters that are gathered together: their numbers, and those of the first rank's slice."""

    numbers: int
    shard: int


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes that are alive at once, by what they are."""

    name: str
    weights: int
    optimizer: int
    gathered: int = 0
    gradients: int = 0
    activations: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gathered + self.gradients + self.activations + self.working


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank: `built` before the first step, `kept` between later ones, and the step's fullest `peak`."""

    built: int
    kept: int
    peak: Moment


FIRST = ("join", "embed", "positions", "embed_norm", "embed_project")
LAST = ("norm", "head", "head_project", "score")


def groups_of(spec: ModelSpec, ranks: int, layers: Sequence[int] | None = None) -> list[Group]:
    """A group for each of `layers` (all of them), then one of what is in none, each cut among `ranks`.

    What is before the layers is where the first one is, what is behind them where the last is, a tied table in both.
    """
    shapes: dict[int, list[tuple[int, ...]]] = {}
    own = range(len(spec.layers)) if layers is None else layers
    needed = {*(FIRST if 0 in own else ()), *(LAST if len(spec.layers) - 1 in own else ())}
    needed |= {"embed"} if spec.tied and "head" in needed else set()
    for name, parameter in Decoder(spec, device="meta").named_parameters():
        part, _, rest = name.partition(".")
        if part != "layers" and part not in needed:
            continue
        index = int(rest.split(".")[0]) if part == "layers" else -1
        shapes.setdefault(index, []).append(tuple(parameter.shape))
    return [_group(shapes.get(index, []), ranks) for index in (*own, -1)]


def _group(shapes: Iterable[tuple[int, ...]], ranks: int) -> Group:
    shapes = list(shapes)
    shard = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in shapes)
    return Group(sum(map(math.prod, shapes)), shard)


def memory(spec: ModelSpec, cut: Cut, load: Load, *, tp: int = 1, layers: Sequence[int] | None = None) -> Memory:
    """What a rank holds of a model with `spec`, of whose `layers` it has some and whose matrices `tp` ranks divide."""
    own = local_spec(spec, tp, 0) if tp > 1 else spec
    return _Walk(own, cut, load, range(len(spec.layers)) if layers is None else layers).result()


class _Walk:
    """One step, from the loss backwards. `moments` are the fullest times of each part of it."""

    def __init__(self, spec: ModelSpec, cut: Cut, load: Load, layers: Sequence[int]) -> None:
        self.spec, self.cut, self.load = spec, cut, load
        self.layers = [spec.layers[index] for index in layers]
        self.policies = [load.policies[index] for index in layers]
        *self.groups, self.root = groups_of(spec, cut.ranks, layers)
        every = [*self.groups, self.root]
        self.numbers, self.shards = (sum(group[at] for group in every) for at in (0, 1))
        self.weights = load.beside + (self.shards * FULL if cut.divided else self.numbers * load.size)
        masters = 0 if cut.divided or load.size == FULL else self.numbers * FULL
        lost = self.shards * cut.ranks * FULL if load.feedback else 0
        self.built = self.weights + masters
        self.optimizer = masters + lost + self.shards * load.states * FULL
        self.each = load.tokens * load.act  # bytes of one number a token
        self.last = len(spec.layers) - 1 in layers
        own = self.root.numbers and not spec.joins  # a draft head reads another model's tables, which stay as they are
        self.table = spec.vocab * spec.width if own else 0
        self.outputs = spec.vocab if spec.head or spec.joins else spec.score or 0
        self.readout = self.outputs * spec.width if own else 0
        self.several = load.parts > 1
        self.at_once = cut.stage >= 2  # each micro-batch's gradients are reduced
        self.before = [load.flight * layer_numbers(layer, spec.hidden, policy) * self.each
                       for layer, policy in zip(self.layers, self.policies)]  # fmt: skip

    def result(self) -> Memory:
        peak = max(map(self._adapted, self._moments()), key=lambda moment: moment.total)
        if self.load.trained < 1.0:
            masters = int((self.built - self.weights) * self.load.trained)
            return Memory(built=peak.weights + masters, kept=peak.weights + peak.optimizer, peak=peak)
        return Memory(built=self.built, kept=self.weights + self.optimizer, peak=peak)

    def _adapted(self, moment: Moment) -> Moment:
        """The moment of a run whose weights are frozen, with adapters beside them."""
        share = self.load.trained
        if share >= 1.0:
            return moment
        weights, optimizer = int(moment.weights * (1 + share)), int(moment.optimizer * share)
        return replace(moment, weights=weights, optimizer=optimizer, gradients=int(moment.gradients * share))

    def _moment(
        self, name: str, gathered: int = 0, gradients: int = 0, activations: int = 0, working: int = 0
    ) -> Moment:
        return Moment(
            name=name, weights=self.weights, optimizer=self.optimizer, gathered=gathered, gradients=gradients,
            activations=activations, working=working,
        )  # fmt: skip

    def _moments(self) -> Iterator[Moment]:
        if self.last:
            yield self._head()
        yield from self._backward()
        yield from self._end()
        yield self._moment("update", gradients=self.shards * FULL)

    # ---------------------------------------------------------------------------------------- moments
    def _head(self) -> Moment:
        """The last chunk of rows: its logits, the gradient of the head beside what earlier chunks gave."""
        rows = min(self.load.tokens, max(CHUNK_ROWS, CHUNK_NUMBERS // self.outputs))
        first = rows == self.load.tokens and (not self.several or self.at_once or not self.cut.divided)
        again = 0 if first or (not self._collects() and not self.cut.divided) else self.readout * self._grad_size()
        fresh = self.readout * (self.load.size + self._widened())
        working = rows * self.outputs * self.load.act + self.spec.hidden * self.each + fresh
        return self._moment(
            "head",
            self._held_whole(len(self.layers)),
            self._waiting() + again + self._left(),
            self._kept_outside() + sum(self.before),
            working,
        )

    def _backward(self) -> Iterator[Moment]:
        """Each layer from the last one on."""
        frames = 2 * self.spec.hidden * self.each  # the loss's gradients in pieces and as one
        head = self.readout * self._grad_size() if self._collects() or self.cut.divided else 0
        reduced, coming = 0, self._left()
        for index in reversed(range(len(self.layers))):
            layer, group = self.layers[index], self.groups[index]
            below = (
                self._kept_outside()
                + sum(self.before[:index])
                + (self.load.flight - 1) * self.before[index] // self.load.flight
            )
            held, grads, most = self._rebuilt(layer, self.policies[index]), 0, 0
            kept = 0
            for node in nodes(layer, self.spec.hidden):
                here = (
                    held * self.each + node.live * self.each + grads + node.weights * (self.load.size + self._widened())
                )
                if here > most:
                    most, kept = here, held * self.each
                held -= node.frees
                grads += node.weights * self.load.size if self._collects() else 0
            gathered = self._held_whole(index)
            yield self._moment(
                f"layer {index}",
                gathered,
                self._waiting(index) + head + reduced + coming,
                below + kept,
                most - kept + frames,
            )
            if not self.cut.divided:
                reduced += group.numbers * self.load.size if self._collects() else 0
                continue
            coming = group.shard * self.cut.ranks * FULL
            again = self.several and self.at_once  # slices of earlier micro-batches take what is added
            sums = self._waiting(index) + head + reduced + coming + (group.shard * FULL if again else 0)
            grads = max(group.numbers * self._grad_size(), self._output(group))
            gathered -= group.shard * self.cut.ranks * self.load.size  # let go first
            yield self._moment(f"reduce {index}", gathered, sums + grads, below, self.spec.hidden * self.each + frames)
            reduced += 0 if again and (self.cut.copies == 1 or self.load.parts > 2) else group.shard * FULL

    def _end(self) -> Iterator[Moment]:
        """The embedding's gradient, and the reduction of what is in no layer; alone: sums of narrow gradients."""
        size, load = self._grad_size(), self.load
        frames = 4 * self.spec.hidden * self.each
        behind = 0 if self.several and self.at_once else sum(group.shard for group in self.groups) * FULL
        if not self.cut.divided:
            grads = self.numbers * load.size if self._collects() else 0
            working = self.table * (load.size if self.spec.tied or self.several else 0) + frames
            yield self._moment("root", 0, grads + self._waiting(), 0, working)
            if load.size < FULL:
                yield self._moment("sum", 0, self.numbers * FULL + (grads if self.several else 0), 0, 0)
            return
        whole = self.root.numbers * size
        coming = self.groups[0].shard * self.cut.ranks * FULL if self.groups else 0
        again = self.table * load.size if self.spec.tied or self.several else 0
        gathered = self._held_whole(-1)
        yield self._moment("root", gathered, behind + self._waiting(-1) + whole + coming, 0, again + frames)
        padded = self.root.shard * self.cut.ranks * FULL
        waiting = self._waiting(-1) if self.at_once else 0
        yield self._moment("reduce root", 0, behind + waiting + padded + max(whole, self._output(self.root)), 0, frames)

    # ---------------------------------------------------------------------------------------- pieces
    def _held_whole(self, index: int) -> int:
        """Gathered weights at layer `index` going backwards; the number of layers: before the first; -1: after them."""
        if not self.cut.divided:
            return 0
        ranks, size = self.cut.ranks, self.load.size
        root = self.root.shard * ranks * size
        if self.cut.stage < 3:
            return root + sum(group.shard for group in self.groups[: index + 1]) * ranks * size
        if not 0 <= index < len(self.groups):
            return root
        return root + sum(group.shard for group in self.groups[max(0, index - 1) : index + 1]) * ranks * size

    def _waiting(self, index: int | None = None) -> int:
        """Gradients that earlier micro-batches left: slices where each is reduced, whole ones where the last is."""
        if not self.several:
            return 0
        if not self.cut.divided:
            return self.numbers * FULL
        if self.at_once:  # FSDP2 holds what copies have added up until the group's next sum
            return self.shards * FULL * (2 if self.cut.copies > 1 and self.load.parts > 2 else 1)
        left = self.groups if index is None else self.groups[: index + 1]
        rest = (
            0 if index == -1 else max(0, self.root.numbers - self.readout)
        )  # the head's own is counted where it grows
        return (sum(group.numbers for group in left) + rest) * FULL

    def _left(self) -> int:
        """What the micro-batch before has reduced last, in the buffer that is let go when the next one is filled."""
        return self.root.shard * self.cut.ranks * FULL if self.cut.divided and self.several and self.at_once else 0

    def _kept_outside(self) -> int:
        """The last norm's input, the hidden states that the loss reads, positions and their angles."""
        dims = [place.dim for layer in self.spec.layers if isinstance(place := layer.mixer.position, Rope)]
        return ((2 if self.spec.norm else 1) * self.spec.hidden + max(dims, default=0)) * self.each

    def _rebuilt(self, layer: LayerSpec, policy: Policy) -> int:
        """Numbers a token that a layer holds when its backward pass has begun, what it ran again among them."""
        held = layer_numbers(layer, self.spec.hidden, "none")
        if policy != "selective":
            return held
        return min(held, layer_numbers(layer, self.spec.hidden, policy) + self.spec.hidden)

    def _grad_size(self) -> int:
        return FULL if self.cut.divided and self.several and not self.at_once else self.load.size

    def _widened(self) -> int:
        """Bytes of a weight's copy in fp32 that a product's backward pass makes."""
        return FULL if self.load.size < self.load.act else 0

    def _collects(self) -> bool:
        """Whether a layer's fresh gradients are apart from those that were there before."""
        return not self.several or self.at_once or self.load.size < FULL

    def _output(self, group: Group) -> int:
        """What a reduction makes; one rank alone divides a copy by one."""
        return group.shard * FULL * (2 if self.cut.ranks == 1 else 1)


class Node(NamedTuple):
    """A call of a layer's backward pass: numbers a token of gradients alive in it and of what it frees; its weights."""

    live: int
    frees: int
    weights: int = 0


def nodes(layer: LayerSpec, hidden: int) -> list[Node]:
    """A layer's backward pass, in order. Live: what comes from above, what flows between, and what it makes."""
    mixer, total = layer.mixer, layer_numbers(layer, hidden, "none")
    product, q = mixer.q_width + 2 * mixer.kv_width, mixer.q_width
    turned = mixer.q_width + mixer.kv_width
    found = [*_feed_forward(layer, hidden), Node(3 * hidden, hidden)]
    found += [
        Node(hidden + q, 0, hidden * q),
        Node(hidden + q + product, 0),
        Node(hidden + 2 * product, turned + product + q + mixer.heads),
        Node(2 * hidden + product, hidden, hidden * product),
    ]
    left = max(0, total - sum(node.frees for node in found))
    return [*found, Node(3 * hidden, left)]


def _feed_forward(layer: LayerSpec, hidden: int) -> Sequence[Node]:
    match layer.ffn:
        case Gated(width=width):
            return (
                Node(hidden + width, width, hidden * width),
                Node(hidden + 3 * width, 2 * width),
                Node(2 * hidden + 2 * width, hidden, 2 * hidden * width),
            )
        case Plain(width=width):
            return (
                Node(hidden + width, width, hidden * width),
                Node(hidden + 2 * width, width),
                Node(2 * hidden + width, hidden, hidden * width),
            )
        case Mixture() as mixture:
            rows = mixture.top_k * (4 * mixture.width + hidden)
            return (Node(2 * hidden + rows, hidden, 3 * mixture.experts * mixture.width * hidden),)
