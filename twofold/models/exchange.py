"""A decoder whose experts are divided among ranks: cut in place, names kept, tokens sent to where their experts are.

    layers.3.experts.gate_up.weight   [E, 2F, D]  ──▶  [E / N, 2F, D], the rows that `expert_rows` names
    layers.3.experts.down.weight      [E, D, F]   ──▶  [E / N, D, F]

All else is whole on every rank: routers choose among all experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from ..core import ConfigError
from ..parallel.expert import Rows, rows_of, through
from .decoder import Decoder, Experts
from .tensors import Weight


def split_experts(decoder: Decoder, group: dist.ProcessGroup | None) -> None:
    """Keep this rank's experts of every mixture, and go to the other ranks of `group` for theirs.

    The decoder was whole, and the same on every rank; None changes nothing. From then on a forward, and a backward, is
    a collective of the group. Each rank's gradients are those of all the group's tokens, for its own experts.

    Raises:
        ConfigError: a mixture whose experts the ranks cannot share evenly, or one that is quantized.
    """
    if group is None:
        return
    rows = expert_rows(decoder, group.size(), group.rank())
    for name, experts in mixtures(decoder):
        for part in (experts.gate_up, experts.down):
            if not isinstance(part, Weight):
                raise ConfigError(f"{name} is quantized: divide the experts of a float decoder")
        for last in ("gate_up", "down"):
            weight: Weight = getattr(experts, last)
            mine = weight.weight.detach()[rows[f"{name}.{last}.weight"].slice].clone()
            weight.weight = nn.Parameter(mine, weight.weight.requires_grad)
        experts.exchange = Exchange(group, experts.spec.experts // group.size())


def expert_rows(decoder: Decoder, ranks: int, rank: int) -> dict[str, Rows]:
    """What rank `rank` of `ranks` has of each parameter that is divided, by name; the same before and after the cut.

    Raises:
        ConfigError: experts that the ranks cannot share evenly; it names how many ranks could.
    """
    found: dict[str, Rows] = {}
    for name, experts in mixtures(decoder):
        for last in ("gate_up", "down"):
            found[f"{name}.{last}.weight"] = rows_of(experts.spec.experts, ranks, rank)
    return found


def whole_experts(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Each divided parameter, whole, by name, one at a time; a collective of the ranks that share them."""
    for name, experts in mixtures(decoder):
        for last in ("gate_up", "down") if isinstance(experts.exchange, Exchange) else ():
            assert isinstance(experts.exchange, Exchange)
            yield f"{name}.{last}.weight", experts.exchange.whole(getattr(experts, last).weight.detach())


@contextmanager
def joined(decoder: Decoder) -> Iterator[None]:
    """While entered, every rank has all experts, as a decoder that can be saved and served; a collective."""
    parts: list[tuple[Weight, nn.Parameter]] = []
    exchanges = [(experts, experts.exchange) for _, experts in mixtures(decoder)]
    for name, whole in whole_experts(decoder):
        weight = decoder.get_submodule(name.removesuffix(".weight"))
        assert isinstance(weight, Weight)
        parts.append((weight, weight.weight))
        weight._parameters["weight"] = nn.Parameter(whole, requires_grad=False)
    for experts, _ in exchanges:
        experts.exchange = None
    try:
        yield
    finally:
        for weight, part in parts:
            weight._parameters["weight"] = part
        for experts, exchange in exchanges:
            experts.exchange = exchange


def mixtures(decoder: Decoder) -> Iterator[tuple[str, Experts]]:
    """The experts of each mixture, by the name of their place."""
    for name, module in decoder.named_modules():
        if isinstance(module, Experts):
            yield name, module


class Exchange:
    """What `Experts.forward` goes through when `each` of its experts live on each rank of `group`."""

    def __init__(self, group: dist.ProcessGroup, each: int) -> None:
        self.group, self.each = group, each

    def whole(self, part: Tensor) -> Tensor:
        """The parts of a tensor that the ranks have, in order."""
        out = part.new_empty((self.group.size() * part.shape[0], *part.shape[1:]))
        dist.all_gather_into_tensor(out, part.contiguous(), group=self.group)
        return out

    def __call__(self, experts: Experts, x_TD: Tensor, weights_TC: Tensor, experts_TC: Tensor) -> Tensor:
        return through(x_TD, weights_TC, experts_TC, self.each, self.group, experts.multiply)
