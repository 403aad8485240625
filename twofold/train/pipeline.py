"""Pipeline parallel: ranks that hold a part of the layers, on the schedules of torch.distributed.pipelining.

    rank 0   embed, layers 0-1   F0 F1 F2 F3 .. B0 .. B1      1F1B (Narayanan et al. 2021), interleaved (several stages
    rank 1   layers 2-3, norm       F0 B0 F1 B1 F2 B2         a rank), zero bubble (Qi et al. 2024)

Every stage is a window on the same decoder with the other layers taken out, so parameters keep their names. A tied
table is on the first stage and on the last, whose gradients are added up. The loss starts its backward pass as it goes,
so the last stage gives the schedule a number that knows its gradient already.

Shapes: M micro-batches of L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from ..core import ConfigError
from ..models.context import AttnContext
from ..models.decoder import Decoder
from ..models.spec import ModelSpec
from ..parallel import Mesh, ParallelConfig
from . import loss as losses

Placed = tuple[Tensor, Tensor, AttnContext]
"""A rank's ids, targets and context of a micro-batch."""

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
SINGLE = ("gpipe", "1f1b")


class Pipeline:
    """This rank's stages of a model with `spec`.

    Raises:
        ConfigError: fewer layers than stages, or a schedule that wants another number of stages a rank.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, config: ParallelConfig) -> None:
        group = mesh.group("pp")
        assert group is not None, "a pipeline of one rank is none"
        self.mesh, self.config, self.group, self.vocab = mesh, config, group, spec.vocab
        self.ranks, self.rank, self.tied = group.size(), group.rank(), spec.tied
        if config.pp_schedule in SINGLE and config.pp_stages > 1:
            raise ConfigError(
                f'parallel.pp_schedule = "{config.pp_schedule}" has one stage a rank, not {config.pp_stages}: '
                'set pp_stages = 1, or take "interleaved" or "zero_bubble"'
            )
        self.within = mesh.size("tp") if config.sequence else 1
        """Between layers a rank has one in so many tokens."""
        self.count = self.ranks * config.pp_stages
        layers = len(spec.layers)
        if layers < self.count:
            raise ConfigError(
                f"parallel.pp x pp_stages is {self.count} stages, but the model has {layers} layers: "
                f"the most ranks it can have is {layers // config.pp_stages}"
            )
        ends = [layers * (stage + 1) // self.count for stage in range(self.count)]
        self.ranges = [range(start, end) for start, end in zip([0, *ends], ends)]
        self.stages: list[Stage] = []
        self._ends = self._both_ends()
        self._schedules: dict[tuple[int, int], Any] = {}
        self._learning: tuple[Decoder, float, int, losses.Loss]

    def _both_ends(self) -> dist.ProcessGroup | None:
        """The group of the first and the last rank of this pipeline, for a tied table. All ranks make all of them."""
        mine = None
        for ranks in self.mesh.layout.groups("pp"):
            ends = dist.new_group([ranks[0], ranks[-1]])
            if self.mesh.rank_in_world in (ranks[0], ranks[-1]):
                mine = ends
        return mine if self.tied else None

    def take_out(self, decoder: Decoder) -> None:
        """Leave of a decoder only what this rank's stages need."""
        own = range(self.rank, self.count, self.ranks)
        kept = {index for stage in own for index in self.ranges[stage]}
        for index in range(len(decoder.layers)):
            if index not in kept:
                decoder.layers[index] = nn.Identity()
        first, last = 0 in own, self.count - 1 in own
        for name, needed in (
            ("embed", first or (last and self.tied)),
            ("positions", first),
            ("embed_norm", first),
            ("embed_project", first),
            ("head_project", last),
            ("norm", last),
            ("head", last),
            ("score", last),
        ):
            if hasattr(decoder, name) and not needed:
                delattr(decoder, name)
        self.stages = [Stage(decoder, number, self.count, self.ranges[number]) for number in own]

    def copies(self, name: str) -> int:
        """How many ranks hold a parameter; a norm over all ranks counts it once."""
        return 2 if self._ends is not None and name == "embed.weight" else 1

    @torch.no_grad()
    def collect(self, decoder: Decoder) -> None:
        """After a step's last backward pass: the two ends of a tied table add up what they learned."""
        if self._ends is not None:
            grad = decoder.embed.weight.grad
            assert grad is not None
            dist.all_reduce(grad.to_local() if hasattr(grad, "to_local") else grad, group=self._ends)

    # ---------------------------------------------------------------------------------------- running
    def wanted(self, parts: int) -> int:
        """How many micro-batches a step of at least `parts` has: as many for each rank, so that none waits for long."""
        return -(-parts // self.ranks) * self.ranks

    def run(self, parts: Sequence[Placed], total: float, decoder: Decoder, loss: losses.Loss) -> float:
        """Forward and backward over all micro-batches, of equal length; the summed loss, on the last stage's rank."""
        ids, targets = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
        for stage in self.stages:
            stage.contexts = [part[2] for part in parts]
        self._learning = decoder, total, self.vocab, loss
        schedule = self._schedule(len(parts), ids.shape[1], decoder)
        found: list[Tensor] = []
        first, last = (any(getattr(stage, end) for stage in self.stages) for end in ("first", "last"))
        schedule.step(
            *([ids] if first else []),
            number=torch.arange(len(parts)),
            target=targets if last else None,
            losses=found if last else None,
            return_outputs=False,
        )
        return float(sum(value.item() for value in found))

    def _score(self, hidden_1LD: Tensor, targets_1L: Tensor) -> Tensor:
        return cast(Tensor, _Learned.apply(hidden_1LD, targets_1L, *self._learning))

    def _schedule(self, count: int, tokens: int, decoder: Decoder) -> Any:
        """Shapes are part of a schedule: one for each number of micro-batches and of tokens."""
        key = count, tokens
        if key not in self._schedules:
            device = decoder.device if hasattr(decoder, "embed") else next(decoder.parameters()).device
            shapes = {
                last: (1, tokens if last else tokens // self.within, decoder.spec.hidden) for last in (False, True)
            }
            hidden = {last: torch.empty(shape, device="meta", requires_grad=True) for last, shape in shapes.items()}
            ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
            made = [
                PipelineStage(
                    stage, stage.number, self.count, device,
                    input_args=ids if stage.first else hidden[False], output_args=hidden[stage.last], group=self.group,
                )
                for stage in self.stages
            ]  # fmt: skip
            kind, single = SCHEDULES[self.config.pp_schedule], self.config.pp_schedule in SINGLE
            self._schedules[key] = kind(
                made[0] if single else made, n_microbatches=count, loss_fn=self._score, scale_grads=False
            )
        return self._schedules[key]

    @torch.no_grad()
    def evaluate(self, part: Placed, decoder: Decoder) -> tuple[float, int]:
        """The summed loss and the number of targets of one micro-batch, on the last stage's rank; else nothing."""
        ids, targets, ctx = part
        hidden_1LD = torch.empty(1, len(ids) // self.within, decoder.spec.hidden)
        held: dict[int, Tensor] = {0: ids[None]}
        for number in range(self.count):
            source, owner = (number - 1) % self.ranks, number % self.ranks
            if owner != self.rank:
                continue
            stage = next(stage for stage in self.stages if stage.number == number)
            stage.contexts = [ctx]
            if number and source != self.rank:
                dist.recv(hidden_1LD, group=self.group, group_src=source)
                held[number] = hidden_1LD
            out = stage(held.pop(number), torch.tensor([0]))
            if stage.last:
                return losses.evaluate(decoder, out[0], targets, self.vocab)
            if owner == (number + 1) % self.ranks:
                held[number + 1] = out
            else:
                dist.send(out.contiguous(), group=self.group, group_dst=(number + 1) % self.ranks)
        return 0.0, 0


class Stage(nn.Module):
    """Some layers of a decoder, with what is before them on the first stage and behind them on the last."""

    def __init__(self, decoder: Decoder, number: int, count: int, layers: range) -> None:
        super().__init__()
        self.number, self.first, self.last = number, number == 0, number == count - 1
        self.layers = nn.ModuleList(decoder.layers[index] for index in layers)
        before, behind = (
            ("embed", "positions", "embed_norm", "embed_project"),
            ("norm", "head", "head_project", "score", "embed"),
        )
        for name in {*(before if self.first else ()), *(behind if self.last else ())}:
            if hasattr(decoder, name):
                self.add_module(name, getattr(decoder, name))
        self._decoder = [decoder]  # in a list: its parameters are not this module's
        self.contexts: list[AttnContext] = []

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """ids [1, L] or hidden states [1, L, D] of micro-batch `number` [1] to hidden states [1, L, D]."""
        ctx, decoder = self.contexts[int(number)], self._decoder[0]
        x_LD = decoder.embedded(x[0], ctx.positions_T) if self.first else x[0]
        angles = {rope: make(ctx.positions_T) for rope, make in decoder.angles.items()}
        for layer in self.layers:
            x_LD = layer(x_LD, ctx, angles)
        if self.last and decoder.spec.norm:
            x_LD = decoder.norm(x_LD)
        return x_LD[None].clone()  # the zero bubble schedule detaches outputs in place, which no view allows


class _Learned(torch.autograd.Function):
    """The loss of one micro-batch, which has already given the head its gradient; backward: that of hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden_1LD: Tensor, targets_1L: Tensor, decoder: Decoder, total: float, vocab: int, loss: losses.Loss
    ) -> Tensor:
        leaf_LD = hidden_1LD[0].detach().requires_grad_()
        with torch.enable_grad():
            summed = losses.backward(decoder, leaf_LD, targets_1L[0], total, vocab, loss)
        ctx.save_for_backward(leaf_LD.grad)
        return hidden_1LD.new_tensor(summed, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.saved_tensors[0][None], None, None, None, None, None
