"""Zero: parameters, gradients and optimizer states divided among ranks, on PyTorch's FSDP2.

    stage   what a rank keeps       gathered                    reduced          volume of m micro-batches
    0       everything              never                       after the last   2Ψ
    1       1/N of the states       once, at the first forward  after the last   2Ψ
    2       and of the gradients    once                        after each       (1 + m)Ψ
    3       and of the parameters   at each forward, backward   after each       3mΨ

(Rajbhandari et al. 2020; Ψ numbers of the model.) Gradients are added up, not averaged: a step's loss is already
divided by its global number of targets. "hybrid" is stage 3 over the ranks of a node, with a copy on every node. Stage
0 in fp32 with nothing beside it needs no FSDP2 (`replicas.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..core import ConfigError
from ..models.decoder import Decoder, Experts, Layer
from ..models.exchange import joined, mixtures
from ..parallel import Mesh, ParallelConfig
from ..parallel.compress import NarrowGather, NarrowReduce
from .replicas import Replicas

M = TypeVar("M", bound=nn.Module)


class Zero(Generic[M]):
    """A decoder, or any module of blocks, divided over a mesh. Alone it is as it was."""

    def __init__(
        self,
        decoder: M,
        mesh: Mesh,
        dtype: torch.dtype | None = None,
        roots: Sequence[nn.Module] = (),
        config: ParallelConfig | None = None,
        blocks: Sequence[nn.Module] | None = None,
        overlap: bool = True,
    ) -> None:
        """Divide `decoder` in place, a group of parameters for each block (a decoder's layers) and one for the rest.

        `dtype` is what weights are multiplied in; the shards that the optimizer moves stay as the decoder has them.
        `roots` are the modules whose forwards are called: the decoder's own, or the stages of a pipeline. `overlap`:
        gradients stay where autograd puts them until the backward pass is done, and may travel from there.
        """
        self.decoder, self.stage, self.dtype = decoder, mesh.layout.stage, dtype or next(decoder.parameters()).dtype
        self.parts: list[FSDPModule] = []
        self._replicas: Replicas | None = None
        if mesh.size("data") * mesh.size("sp") == 1:
            return
        group, plain = mesh.group("replicate"), config is None or config.comm == "plain"
        copied = self.stage == 0 and mesh.size("zero") == 1 and not roots  # sequence parallel ranks divide it, too
        if copied and overlap and plain and group and Replicas.suit(decoder, dtype):
            self._replicas = Replicas(cast(Decoder, decoder), group)
            return
        devices, holders = mesh.sharded(), mesh.sharded(experts=True)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        blocks = _blocks(decoder) if blocks is None else blocks
        for number, module in enumerate((*blocks, *(roots or [decoder]))):
            last = number >= len(blocks)  # the loss reads its weights behind the forward
            again = self.stage == 3 and not last
            among = holders if isinstance(module, Experts) else devices  # those that have the same experts
            fully_shard(module, mesh=among, reshard_after_forward=again, mp_policy=policy)
            part = cast(FSDPModule, module)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no averages
            part.set_gradient_divide_factor(1.0)
            _narrow(part, config or ParallelConfig(), mesh)
            self.parts.append(part)

    def micro_batch(self, last: bool) -> None:
        """Before a micro-batch's forward: what of it is to be reduced and let go, by the stage."""
        if self._replicas:
            self._replicas.begin(due=last)
        if not self.parts:
            return
        root = self.parts[-1]
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(last or self.stage >= 2)
        root.set_reshard_after_backward(last or self.stage == 3)

    @contextmanager
    def whole(self) -> Iterator[M]:
        """The decoder with all its parameters on every rank; a collective. Inside, a rank may run it on its own."""
        for part in self.parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            with joined(self.decoder) if isinstance(self.decoder, Decoder) else nullcontext():
                yield self.decoder
        finally:
            for part in self.parts:
                part.set_reshard_after_forward(self.stage == 3 and part is not self.parts[-1], recurse=False)
            self.settle()

    def settle(self) -> None:
        """Let gathered parameters go, so that the decoder has its shards, whatever ran last."""
        for part in self.parts:
            part.reshard()


def _blocks(module: nn.Module) -> list[nn.Module]:
    """A decoder's layers, and before them the experts that ranks have between them."""
    if not isinstance(module, Decoder):
        return []
    apart = [experts for _, experts in mixtures(module) if experts.exchange is not None]
    return [*apart, *(layer for layer in module.layers if isinstance(layer, Layer))]


def _narrow(part: FSDPModule, config: ParallelConfig, mesh: Mesh) -> None:
    """Let a group of parameters travel in fewer bits where the recipe says so."""
    if config.comm == "plain":
        return
    if mesh.size("zero") == 1:
        raise ConfigError(
            f'parallel.comm = "{config.comm}" narrows what ZeRO gathers and reduces, and stage 0 does neither: '
            "set parallel.zero to 1 or more"
        )
    part.set_custom_reduce_scatter(NarrowReduce(config.comm, config.comm_warmup if config.comm == "onebit" else 0))  # type: ignore[arg-type]
    if config.comm != "onebit":
        part.set_custom_all_gather(NarrowGather())  # type: ignore[arg-type]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
