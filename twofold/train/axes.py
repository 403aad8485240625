"""Axes: what tensor, sequence, expert and pipeline parallel change about a step, in one place.

micro-batch ─pad─▶ tokens that divide evenly ─place─▶ this rank's ids, targets and context
backward ─collect─▶ gradients of what several ranks hold ─▶ norm, each parameter counted once
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import ConfigError
from ..data import Batch
from ..models.decoder import Decoder
from ..models.exchange import expert_rows, split_experts
from ..models.packed import PackedContext
from ..models.parallel import TensorParallel
from ..models.sequence import DividedContext, RingContext, UlyssesContext, check
from ..models.spec import ModelSpec
from ..parallel import Mesh, ParallelConfig
from ..parallel.expert import Rows
from .loss import IGNORE
from .pipeline import Pipeline, Placed
from .share import nothing, share


class Axes:
    """The tensor, sequence, expert and pipeline axes of a mesh. Alone, everything is as it was."""

    def __init__(self, mesh: Mesh | None = None, config: ParallelConfig | None = None) -> None:
        self.mesh, self.config = mesh or Mesh(), config or ParallelConfig()
        self.tensor: TensorParallel | None = None
        self.pipeline: Pipeline | None = None
        self.experts: dict[str, Rows] = {}
        """Which experts of each divided parameter this rank has."""
        ring = self.config.sp_kind == "ring" and self.mesh.size("sp") > 1
        within = self.mesh.size("tp") if self.config.sequence else 1
        self._multiple = self.mesh.size("sp") * (2 if ring else 1) * within

    def divide(self, spec: ModelSpec, **how: Any) -> Decoder:
        """A decoder of this rank's part of a model, its weights still to be filled (`part`).

        Raises:
            ConfigError: heads or widths do not divide; the nearest number of ranks that would do is named.
        """
        if self.mesh.size("sp") > 1:
            check(spec, self.mesh.size("sp"), self.config.sp_kind)
        group = self.mesh.group("tp")
        if group is None:
            decoder = Decoder(spec, **how)
        else:
            self.tensor = TensorParallel(spec, group, sequence=self.config.sequence, **how)
            decoder = self.tensor.decoder
        ep = self.mesh.group("ep")
        if ep is not None:
            self.experts = expert_rows(decoder, ep.size(), ep.rank())
            if not self.experts:
                raise ConfigError(f"parallel.ep is {ep.size()}, but this model has no experts: set it to 1")
            split_experts(decoder, ep)
        if self.mesh.size("pp") > 1:
            self.pipeline = Pipeline(spec, self.mesh, self.config)
            self.pipeline.take_out(decoder)
        return decoder

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole parameter."""
        part = self.tensor.part(name, whole) if self.tensor else whole
        return part[rows.slice] if (rows := self.experts.get(name)) else part

    def share(self, batch: Batch, tokens: int | None) -> list[Batch]:
        """This rank's micro-batches of a step, each of at most `tokens` tokens where sequences allow."""
        data, rank = self.mesh.size("data"), self.mesh.rank("data")
        if self.pipeline is None:
            return share(batch, data, rank, tokens)
        even = -(-len(batch.ids_T) // (data * self.pipeline.ranks))  # a micro-batch for each rank at least
        parts = share(batch, data, rank, min(tokens or even, even))
        parts += [nothing(batch)] * (self.pipeline.wanted(len(parts)) - len(parts))
        longest = max(len(part.ids_T) for part in parts)
        return [pad(part, longest) for part in parts]

    def place(self, batch: Batch) -> Placed:
        """This rank's ids and targets of a micro-batch, and the context they are read in."""
        batch = pad(batch, self._multiple)
        group = self.mesh.group("sp")
        if group is None:
            return batch.ids_T, batch.targets_T, PackedContext(batch.lengths, places_T=batch.places())
        kind = RingContext if self.config.sp_kind == "ring" else UlyssesContext
        ctx: DividedContext = kind(batch.lengths, group)
        ctx.places_T = ctx.mine(batch.places())
        return ctx.mine(batch.ids_T), ctx.mine(batch.targets_T), ctx

    def collect(self, decoder: Decoder) -> None:
        """After a step's last backward pass: gradients of what several ranks hold."""
        if self.tensor:
            self.tensor.collect()
        if self.pipeline:
            self.pipeline.collect(decoder)

    def _copies(self, name: str) -> int:
        """How many ranks hold a parameter, apart from copies of the whole model."""
        return (self.tensor.copies(name) if self.tensor else 1) * (self.pipeline.copies(name) if self.pipeline else 1)

    def norm(self, squares: Mapping[str, float]) -> float:
        """The Euclidean norm of the whole model's gradient, from the squares of this rank's part of it by name."""
        if self.mesh.alone:
            return math.sqrt(sum(squares.values()))
        mine = sum(square / self._copies(name) for name, square in squares.items())
        return math.sqrt(self.mesh.sum("norm", mine)[0])


def pad(batch: Batch, multiple: int) -> Batch:
    """A batch whose tokens divide evenly: a sequence of nothing to learn is put behind."""
    lacking = -len(batch.ids_T) % multiple
    if not lacking:
        return batch
    ids, targets = F.pad(batch.ids_T, (0, lacking)), F.pad(batch.targets_T, (0, lacking), value=IGNORE)
    beside = {
        name: torch.cat((value, value.new_zeros(lacking, *value.shape[1:]))) for name, value in batch.beside.items()
    }
    return replace(
        batch,
        ids_T=ids,
        targets_T=targets,
        lengths=(*batch.lengths, lacking),
        padding=batch.padding + lacking,
        beside=beside,
    )
