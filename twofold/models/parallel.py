"""Tensor parallel: one rank's part of a decoder, and the collectives where the parts meet.

    x ─copy─▶ [qkv] ▶ attend ▶ [out] ─add─▶ + ─copy─▶ [gate_up] ▶ gated ▶ [down] ─add─▶ +        2 sums a layer
    with `sequence`, each rank keeps T/N tokens in between (Korthikanti et al. 2022):
    x ─gather─▶ ...            [out] ─reduce-scatter─▶ + ─gather─▶ ...  [down] ─reduce-scatter─▶

The vocabulary is divided too: each rank looks up its own ids, and the log-probability of a token is put together from
each rank's largest score, sum of exponentials and, on one of them, the token's own score. A score head is whole
on every rank.

Shapes: T tokens, R rows, D hidden size, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.entropy import Scores, chunks, slopes_of
from ..kernels.linear import linear
from ..parallel import comm
from .cuts import WHOLE, Cut, cuts, local_spec
from .decoder import Decoder, Layer
from .spec import Alibi, Head, ModelSpec
from .tensors import Weight


class TensorParallel:
    """A rank's decoder of a model with `spec`, with its place in the tensor parallel group.

    `decoder` is on the meta device's shapes until it is filled: `part(name, whole)` is what goes into each parameter.
    """

    def __init__(self, spec: ModelSpec, group: dist.ProcessGroup, *, sequence: bool = False, **how: Any) -> None:
        self.whole, self.group, self.sequence = spec, group, sequence
        self.ranks, self.rank = group.size(), group.rank()
        self.cuts = cuts(spec)
        self.decoder = Decoder(local_spec(spec, self.ranks, self.rank), **how)
        self._attach()

    def cut(self, name: str) -> Cut:
        return self.cuts.get(name, WHOLE)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter."""
        cut = self.cut(name)
        if not cut.segments:
            return whole
        pieces = [whole[(slice(None),) * cut.dim + (span,)] for span in cut.spans(self.ranks, self.rank)]
        return torch.cat(pieces, cut.dim)

    @torch.no_grad()
    def fill(self, whole: nn.Module) -> Decoder:
        """Take this rank's part of every parameter of the whole model."""
        source = dict(whole.named_parameters())
        for name, parameter in self.decoder.named_parameters():
            parameter.copy_(self.part(name, source[name]))
        buffers = dict(whole.named_buffers())
        for name, buffer in self.decoder.named_buffers():
            buffer.copy_(buffers[name])
        return self.decoder

    def copies(self, name: str) -> int:
        """How many ranks hold a parameter; a norm over all ranks counts it once."""
        cut = self.cut(name)
        return 1 if cut.segments or cut.first else self.ranks

    @torch.no_grad()
    def collect(self) -> None:
        """After the last backward pass: add up the gradients of what every rank holds but sees a part of."""
        for name, parameter in self.decoder.named_parameters():
            if parameter.grad is not None and self._partial(name):
                grad = parameter.grad
                local = grad.to_local() if hasattr(grad, "to_local") else grad
                dist.all_reduce(local, group=self.group)

    def _partial(self, name: str) -> bool:
        """Whether a rank's gradient of a whole parameter is a part of it: a norm of its own heads, or of its tokens."""
        return (
            name.startswith("layers.")
            and self.copies(name) > 1
            and (self.sequence or ".q_norm." in name or ".k_norm." in name)
        )

    # ---------------------------------------------------------------------------------------- hooks
    def _attach(self) -> None:
        decoder = self.decoder
        first = self.cuts["embed.weight"].spans(self.ranks, self.rank)[0].start
        for name in ("embed", "head"):
            if isinstance(table := getattr(decoder, name, None), Weight):
                setattr(decoder, name, CutTable(table, self.group, first, self.whole.vocab))
        for layer in decoder.layers:
            assert isinstance(layer, Layer)
            self._attach_layer(layer)
        if self.sequence and len(decoder.layers):
            decoder.layers[0].register_forward_pre_hook(lambda _, args: (comm.scatter(args[0], self.group), *args[1:]))
            decoder.layers[-1].register_forward_hook(lambda _, args, out: comm.gather(out, self.group))

    def _attach_layer(self, layer: Layer) -> None:
        mixer = self.whole.layers[layer.index].mixer
        if isinstance(mixer.position, Alibi):
            own = slice(self.rank * mixer.heads // self.ranks, (self.rank + 1) * mixer.heads // self.ranks)
            layer.attend = replace(layer.attend, slopes=mixer.position.slopes(mixer.heads)[own])
        if layer.attend.sparse is not None:
            own_heads = replace(layer.attend.sparse, first_head=self.rank * layer.attend.sparse.heads)
            layer.attend = replace(layer.attend, sparse=own_heads)
        for name in ("qkv", "gate_up", "up"):
            self._enter(getattr(layer, name, None))
        for name in ("out", "down"):
            module = getattr(layer, name, None)
            self._leave(module)
            if self.rank and isinstance(module, Weight):
                module.bias = None
        for name in ("experts", "shared"):
            self._enter(getattr(layer, name, None))
            self._leave(getattr(layer, name, None))

    def _enter(self, module: nn.Module | None) -> None:
        if module is not None:
            enter: Callable[[Tensor], Tensor] = (
                (lambda x: comm.gather(x, self.group, add=True))
                if self.sequence
                else (lambda x: comm.copy_to(x, self.group))
            )
            module.register_forward_pre_hook(lambda _, args: tuple(enter(x) for x in args))

    def _leave(self, module: nn.Module | None) -> None:
        if module is not None:
            leave = comm.reduce_scatter if self.sequence else comm.reduce_from
            module.register_forward_hook(lambda _, args, out: leave(out, self.group))


class CutTable(Weight):
    """Rows `first` and on of an embedding or a head over a vocabulary of `vocab`."""

    def __init__(self, table: Weight, group: dist.ProcessGroup, first: int, vocab: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = table.weight, table.bias
        self.group, self.first, self.vocab = group, first, vocab

    def _own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each id's row is here, and where (row 0 when it is not)."""
        here = (ids >= self.first) & (ids < self.first + len(self.weight))
        return here, (ids - self.first) * here

    def rows(self, ids_T: Tensor) -> Tensor:
        here_T, place_T = self._own(ids_T)
        return comm.reduce_from(F.embedding(place_T, self.weight) * here_T[:, None], self.group)

    def forward(self, x: Tensor) -> Tensor:
        """Scores over the whole vocabulary."""
        own = linear(comm.copy_to(x, self.group), self.weight, self.bias)
        each = -(-self.vocab // self.group.size())
        padded = F.pad(own, (0, each - own.shape[1]))
        return comm.gather(padded, self.group, 1).narrow(1, 0, self.vocab)

    def logprobs(self, hidden_RD: Tensor, ids_R: Tensor, head: Head, keep: bool, temperature: float) -> Tensor:
        whole_RD = comm.copy_to(hidden_RD, self.group)
        logits_RV = Scores(self.weight, self.bias, head.multiplier, head.softcap, temperature).of(whole_RD)
        return cast(Tensor, _CutLogprobs.apply(logits_RV, *self._own(ids_R), self.group))

    def entropy(self, hidden_RD: Tensor, head: Head, temperature: float) -> Tensor:
        whole_RD = comm.copy_to(hidden_RD, self.group)
        shape, widest = (head.multiplier, head.softcap, temperature), -(-self.vocab // self.group.size())
        return cast(Tensor, _CutEntropy.apply(whole_RD, self.weight, self.bias, shape, self.group, widest))


class _CutLogprobs(torch.autograd.Function):
    """log p [R] from each rank's scores [R, V]; backward: 1 at the token's own score less its probability."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, here_R: Tensor, place_R: Tensor, group: dist.ProcessGroup) -> Tensor:
        top_R = logits_RV.max(1).values
        dist.all_reduce(top_R, dist.ReduceOp.MAX, group=group)
        powers_RV = (logits_RV - top_R[:, None]).exp()
        own_R = logits_RV.gather(1, place_R[:, None])[:, 0] * here_R
        both = torch.stack([powers_RV.sum(1), own_R])
        dist.all_reduce(both, group=group)
        sums_R, own_R = both[0], both[1]
        ctx.save_for_backward(powers_RV / sums_R[:, None], here_R, place_R)
        return own_R - top_R - sums_R.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        chances_RV, here_R, place_R = ctx.saved_tensors
        out_RV = chances_RV * -grads[0][:, None]
        out_RV.scatter_add_(1, place_R[:, None], (grads[0] * here_R)[:, None])
        return out_RV, None, None, None


class _CutEntropy(torch.autograd.Function):
    """Entropy [R] over all ranks' parts of the vocabulary, some rows at a time; backward asks nobody."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        w_VD: Tensor,
        b_V: Tensor | None,
        shape: tuple[Any, ...],
        group: dist.ProcessGroup,
        widest: int,
    ) -> Tensor:
        scores = Scores(w_VD, b_V, *shape)
        log_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
        mean_R = torch.empty_like(log_R)
        for at in chunks(len(hidden_RD), widest):  # the same on every rank, for each is two sums
            logits_CV = scores.of(hidden_RD[at])
            top_C = logits_CV.max(1).values
            dist.all_reduce(top_C, dist.ReduceOp.MAX, group=group)
            below_CV = logits_CV - top_C[:, None]
            powers_CV = below_CV.exp()
            both_2C = torch.stack([powers_CV.sum(1), (powers_CV * below_CV).sum(1)])
            dist.all_reduce(both_2C, group=group)
            log_R[at], mean_R[at] = top_C + both_2C[0].log(), top_C + both_2C[1] / both_2C[0]
        ctx.save_for_backward(hidden_RD, w_VD, b_V, log_R, mean_R)
        ctx.shape = shape
        return log_R - mean_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden_RD, w_VD, b_V, log_R, mean_R = ctx.saved_tensors

        def turn(logits_CV: Tensor, at: slice) -> Tensor:
            return slopes_of(logits_CV, log_R[at], mean_R[at], grads[0][at])

        found = Scores(w_VD, b_V, *ctx.shape).slopes(hidden_RD, ctx.needs_input_grad, turn)
        return (*found, None, None, None)
