"""Elastic runs: how many ranks may take part, and how each number of them divides the same batch.

A step's tokens never depend on the ranks: whoever is there takes its share of batch n. What the number decides is how
many micro-batches each rank makes of it, and whether all make the same:

    8 sequences, at most 2 in a micro-batch     1 rank 4 x 2     2 ranks 2 x 2     3 ranks 2 x 2, a ninth idle
                                                4 ranks 1 x 2    8 ranks 1 x 1

`best_batch` turns it around, as DeepSpeed's elasticity does: of all batches up to a size, the one that the most numbers
of ranks divide evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError

HIGHLY_COMPOSITE = (
    1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120, 20160,
    25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400, 665280, 720720,
)  # fmt: skip
"""Numbers with more divisors than any below them."""


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """What a run survives, and how: ranks that come and go, ranks that hang, losses that spike."""

    min: int = 1
    """Fewest ranks that the run goes on with."""
    max: int | None = None
    """Most ranks; with it, the run's first lines say how each number of ranks divides a step."""
    heartbeat: float | None = None
    """Seconds that a step may take; then every rank's stack is written and the run ends with status 76, which torchrun
    starts again. Left out: no watch."""
    on_spike: Literal["none", "skip", "rewind"] = "none"
    """A loss above `spike_factor` times the median of the last `window`: taken as it is; the step changes no weight;
    or the run goes back to the newest checkpoint and passes over the batches since (also when it is not finite)."""
    spike_factor: float = 2.0
    window: int = 32
    """Losses whose median counts; while there are fewer, nothing is a spike."""
    max_rewinds: int = 3
    """The run ends when it would go back to one checkpoint once more."""

    def __post_init__(self) -> None:
        for name in ("min", "max", "heartbeat", "window", "max_rewinds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"elastic.{name} must be more than 0, not {value}")
        if self.max is not None and self.max < self.min:
            raise ConfigError(f"elastic.max is {self.max}, less than elastic.min, {self.min}: raise it")
        if self.spike_factor <= 1:
            raise ConfigError(f"elastic.spike_factor must be more than 1, not {self.spike_factor}")

    def admit(self, world: int) -> None:
        """Let a run of `world` ranks begin.

        Raises:
            ConfigError: they are too few, or too many.
        """
        if world < self.min:
            raise ConfigError(f"{world} ranks are fewer than elastic.min, {self.min}: start more, or lower it")
        if self.max is not None and world > self.max:
            raise ConfigError(f"{world} ranks are more than elastic.max, {self.max}: start fewer, or raise it")


@dataclass(frozen=True)
class Split:
    """How `ranks` divide a batch of whole sequences."""

    ranks: int
    micro_batches: int
    """Of each rank."""
    micro: int
    """Sequences in the largest."""
    idle: float
    """Share of the ranks' time that has nothing to do, for others have more sequences."""

    @property
    def even(self) -> bool:
        return self.idle == 0.0


def split(sequences: int, most: int, ranks: int, per_copy: int = 1) -> Split:
    """How `ranks`, `per_copy` of which hold one copy of the model, divide `sequences`, at most `most` in a micro-batch.

    The fewest micro-batches that fit, for each costs communication, and then the smallest that do.
    """
    readers = ranks // per_copy
    each = -(-sequences // readers)
    count = -(-each // most)
    return Split(ranks, count, -(-each // count), 1.0 - sequences / (readers * each))


def splits(sequences: int, most: int, ranks: Iterable[int], per_copy: int = 1) -> list[Split]:
    """Those of every number of ranks that holds whole copies."""
    return [split(sequences, most, n, per_copy) for n in ranks if n % per_copy == 0 and n]


def best_batch(largest: int, micros: Sequence[int], least: int, most: int) -> tuple[int, list[int]]:
    """The batch of at most `largest` sequences that the most numbers of ranks from `least` to `most` divide evenly, in
    micro-batches of one of the sizes `micros`, and those numbers; of equals the largest.

    Candidates are each size, and their least common multiple, times the largest highly composite number that fits
    (DeepSpeed, elasticity 0.1).

    Raises:
        ConfigError: no size fits, or no number of ranks would do.
    """
    bases = [base for base in {*micros, math.lcm(*micros)} if base <= largest]
    candidates = {base * max(n for n in HIGHLY_COMPOSITE if base * n <= largest) for base in bases}
    found = [(len(ranks := _even(batch, micros, least, most)), batch, ranks) for batch in candidates]
    count, batch, ranks = max(found, default=(0, 0, []))
    if not count:
        raise ConfigError(
            f"no batch of up to {largest} sequences in micro-batches of {', '.join(map(str, micros))} is even over "
            f"{least} to {most} ranks: allow a larger batch, other micro-batches, or fewer ranks"
        )
    return batch, ranks


def _even(batch: int, micros: Sequence[int], least: int, most: int) -> list[int]:
    return [n for n in range(least, most + 1) if any(batch % (n * micro) == 0 for micro in micros)]


def lines(
    config: ElasticConfig, tokens_per_step: int, micro_tokens: int | None, seq_len: int, per_copy: int = 1
) -> list[str]:
    """What a run says of the numbers of ranks that it may have."""
    if config.max is None:
        return []
    sequences, most = tokens_per_step // seq_len, max(1, (micro_tokens or tokens_per_step) // seq_len)
    found = splits(sequences, most, range(config.min, config.max + 1), per_copy)
    said = [
        f"{one.ranks}: {one.micro_batches} x {one.micro}" + ("" if one.even else f" ({one.idle:.0%} idle)")
        for one in found
    ]
    out = [
        f"elastic: a step is {sequences} sequences of {seq_len}, micro-batches of each rank by ranks: "
        f"{', '.join(said) or 'none'}"
    ]
    readers = range(-(-config.min // per_copy), config.max // per_copy + 1)
    even = sum(one.even for one in found)
    if even < len(found):
        batch, ranks = best_batch(2 * sequences, range(1, most + 1), readers.start, readers[-1])
        if len(ranks) > even:
            some = "all" if len(ranks) == len(found) else f"{len(ranks)} of {len(found)}"
            out.append(f"elastic: tokens_per_step = {batch * seq_len} would be even for {some} of these numbers")
    return out
