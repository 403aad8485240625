"""Replicas: the same decoder on every rank, gradients added up while the backward pass goes on (ZeRO stage 0).

    backward   │ layer 2 │ layer 1 │ layer 0 │ embedding │
    on the way           │ ── 2 ── │ ── 1 ── │ ── 0 ──   │ the rest │ wait

A layer's gradients are whole when its backward is done, and travel as they lie, in place. What else there is (norm,
head, embedding) may get more until the end, and goes then. PyTorch DDP's idea (Li et al. 2020) without its buckets:
nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.decoder import Decoder
from ..models.exchange import mixtures


class Replicas:
    """Adds up the gradients of one decoder over `group`, once in each backward pass that is said to be `due`.

    Raises:
        RuntimeError: a second pass through the layers, when what it would add to has been added up.
    """

    def __init__(self, decoder: Decoder, group: dist.ProcessGroup) -> None:
        self._decoder, self._group, self._due, self._done = decoder, group, True, False
        self._watched: set[nn.Parameter] = set()
        self._going: list[dist.Work] = []
        self.begin(due=True)

    def begin(self, due: bool) -> None:
        """Before a pass, `due` or not; parameters may be others than before, for memory is given to a decoder late."""
        self._due, self._done = due, False
        self._going.clear()  # of a pass that failed on its way
        layers = {parameter for parameter in self._decoder.layers.parameters() if parameter.requires_grad}
        for parameter in layers - self._watched:
            parameter.register_post_accumulate_grad_hook(self._ready)
        self._watched = layers

    @staticmethod
    def suit(decoder: nn.Module, dtype: torch.dtype | None) -> bool:
        """Whether gradients are what the optimizer reads, of all that is trained, and all ranks have the same ones."""
        return (
            isinstance(decoder, Decoder)
            and dtype is None
            and len(decoder.layers) > 0
            and all(p.dtype == torch.float32 for p in decoder.parameters() if p.requires_grad)
            and all(experts.exchange is None for _, experts in mixtures(decoder))
        )

    def _ready(self, parameter: Tensor) -> None:
        if not self._due:
            return
        if self._done:
            raise RuntimeError("these gradients are sums over all ranks already: call Zero.micro_batch before a pass")
        if not self._going:
            end: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
            end(self._finish)
        self._send(parameter)

    def _send(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            work = dist.all_reduce(parameter.grad, group=self._group, async_op=True)
            assert work is not None, "asked for"
            self._going.append(work)

    def _finish(self) -> None:
        """The end of the backward pass: every gradient is whole on every rank after it."""
        for parameter in self._decoder.parameters():
            if parameter not in self._watched:
                self._send(parameter)
        for work in self._going:
            work.wait()
        self._going.clear()
        self._done = True
