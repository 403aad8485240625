"""Routers: a decoder's mixtures while they train. Between `begin` and `end` of a step they deal tokens by the recipe's
rules and count; outside a step the decoder chooses as it is served.

    begin(step, tokens)                       the rules are in force
        forward of each micro-batch           choose -> count -> losses join the backward pass -> drop
    end(moved)                                counts of all ranks -> biases move -> figures for the journal

What a layer saw is kept by the place of the micro-batch's first token, so that a layer that is run again for its
gradient counts once and meets the same noise and the same loss.

Shapes: T tokens, D hidden size, E experts, C experts chosen for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import ConfigError
from ..kernels.moe import route, weights_of
from ..models.context import AttnContext
from ..models.decoder import Decoder, Layer
from ..models.spec import Mixture
from . import routing
from .moe_config import MoeConfig


@dataclass(kw_only=True)
class _Seen:
    """What one layer saw of one micro-batch: its choices, those that its balance is judged by, and three sums."""

    counts_E: Tensor
    judged_E: Tensor
    dropped: Tensor
    balance: Tensor
    z: Tensor


class Routers:
    """The mixtures of a decoder, dealt by `config`; `group` are the ranks that read other tokens of the same step.

    Raises:
        ConfigError: rules for a model without mixtures, or biases for a family whose checkpoints have none.
    """

    def __init__(self, decoder: Decoder, config: MoeConfig, seed: int, group: dist.ProcessGroup | None = None) -> None:
        self.config, self.seed, self.group = config, seed, group
        self.mixtures = {
            layer: layer.spec.ffn
            for layer in decoder.layers
            if isinstance(layer, Layer) and isinstance(layer.spec.ffn, Mixture)
        }
        if not self.mixtures and config != MoeConfig():
            raise ConfigError(
                f"{decoder.spec.architecture} has no mixture of experts: take the table [moe] out of the recipe"
            )
        if config.bias_rate and not all(ffn.biased for ffn in self.mixtures.values()):
            raise ConfigError(
                f"moe.bias_rate: checkpoints of {decoder.spec.architecture} have no bias for the choice of experts, so "
                "the model would be served by other experts than it was trained with: give model.config the "
                "architecture Ernie4_5_MoeForCausalLM, or use moe.balance_loss"
            )
        self._step, self._tokens, self._loss_scale = 0, 1, 1.0
        self._seen: dict[tuple[int, int], _Seen] = {}
        self._so_far: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.mixtures)

    def begin(self, step: int, tokens: int, loss_scale: float = 1.0) -> None:
        """Put the rules in force for step `step`, whose batch has `tokens` tokens on all ranks together.

        `loss_scale` is what the step's loss is multiplied by before its backward pass.
        """
        self._step, self._tokens, self._loss_scale = step, tokens, loss_scale
        self._seen.clear()
        self._so_far.clear()
        for layer in self.mixtures:
            layer.routing = partial(self._route, layer)

    @torch.no_grad()
    def end(self, *, moved: bool = True) -> dict[str, float]:
        """Lift the rules, let the biases move if the weights have `moved`, and say how the step went.

        moe_busiest  share of a layer's choices that its busiest expert had, of the worst layer
        moe_dropped  share of all choices that found no room; with a capacity
        moe_balance  the balance loss before its coefficient, mean over layers; 1 is even
        moe_z        the z-loss before its coefficient, mean over layers
        """
        for layer in self.mixtures:
            layer.routing = None
        totals = self._totals()
        if self.config.bias_rate and moved:
            for layer, (counts_E, _) in totals.items():
                bias = layer.choice.bias
                bias.copy_(routing.moved(bias, counts_E.to(bias.device), self.config.bias_rate))
        self._seen.clear()
        self._so_far.clear()
        return self._figures([(counts_E.tolist(), sums.tolist()) for counts_E, sums in totals.values()])

    def _figures(self, totals: list[tuple[list[float], list[float]]]) -> dict[str, float]:
        pairs = [sum(counts) for counts, _ in totals]
        if not sum(pairs):
            return {}
        dropped, balance, z = (sum(sums[i] for _, sums in totals) for i in range(3))
        per_token = 1.0 / (self._tokens * len(totals))
        figures = {"moe_busiest": max(max(counts) / all_ for (counts, _), all_ in zip(totals, pairs) if all_)}
        if self.config.capacity is not None:
            figures["moe_dropped"] = dropped / sum(pairs)
        if self.config.balance_loss:
            figures["moe_balance"] = balance * per_token
        if self.config.z_loss:
            figures["moe_z"] = z * per_token
        return figures

    def _totals(self) -> dict[Layer, tuple[Tensor, Tensor]]:
        """Each layer's counts [E] and sums [3] over the step's micro-batches and ranks, in one message."""
        rows: list[Tensor] = []
        for layer, ffn in self.mixtures.items():
            total = torch.zeros(ffn.experts + 3, dtype=torch.float64, device=layer.router.device)
            for (index, _), seen in self._seen.items():
                if index == layer.index:
                    total += torch.cat((seen.counts_E.double(), torch.stack((seen.dropped, seen.balance, seen.z))))
            rows.append(total)
        flat = torch.cat(rows) if rows else torch.empty(0)
        if self.group is not None and rows:
            dist.all_reduce(flat, group=self.group)
        parts = flat.split([len(row) for row in rows])
        return {layer: (part[:-3], part[-3:]) for layer, part in zip(self.mixtures, parts)}

    # ------------------------------------------------------------------------------------------ one layer's forward
    def _route(self, layer: Layer, x_TD: Tensor, ctx: AttnContext) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights by the rules; stands in for `Layer.route`."""
        config, ffn = self.config, self.mixtures[layer]
        first: int = getattr(ctx, "first", 0)
        key = routing.key_of(self.seed, self._step, layer.index)
        if config.noise == "jitter":
            x_TD = routing.jitter(x_TD, key, first, config.jitter)
        logits_TE = layer.router(x_TD)
        bias_E = layer.choice.bias[0] if ffn.biased else None
        if config.noise == "gumbel":
            drawn_TE = routing.gumbel(logits_TE.detach(), key, first)
            _, experts_TC = route(drawn_TE, ffn.top_k, False, bias_E)
            weights_TC = weights_of(logits_TE, experts_TC, ffn.renormalise)
        else:
            weights_TC, experts_TC = route(logits_TE, ffn.top_k, ffn.renormalise, bias_E)
        seen = self._see(layer, first, experts_TC)
        weights_TC = self._with_losses(weights_TC, logits_TE.float(), seen, self._real(first))
        if config.capacity is None:
            return weights_TC, experts_TC
        most = routing.capacity_of(experts_TC.numel(), ffn.experts, config.capacity, config.min_capacity)
        fits_TC = routing.within(weights_TC, experts_TC, ffn.experts, most, config.drop)
        seen.dropped = (~fits_TC).sum().double() * self._real(first)
        return weights_TC * fits_TC, torch.where(fits_TC, experts_TC, -1)

    def _see(self, layer: Layer, first: int, experts_TC: Tensor) -> _Seen:
        """Count a micro-batch's choices, once."""
        known = self._seen.get((layer.index, first))
        if known is not None:
            return known
        counts_E = judged_E = routing.counts_of(experts_TC, self.mixtures[layer].experts) * self._real(first)
        if self.config.over == "step" and self.config.balance_loss:
            if self.group is not None:
                judged_E = counts_E.clone()
                dist.all_reduce(judged_E, group=self.group)
            judged_E = judged_E + self._so_far.get(layer.index, 0)
            self._so_far[layer.index] = judged_E
        none = torch.zeros((), dtype=torch.float64, device=counts_E.device)
        seen = _Seen(counts_E=counts_E, judged_E=judged_E, dropped=none, balance=none, z=none)
        self._seen[layer.index, first] = seen
        return seen

    def _real(self, first: int) -> int:
        """1, or 0 for a token that only keeps a rank company which no sequence fell to: its place is behind all."""
        return int(first < self._tokens)

    def _with_losses(self, weights_TC: Tensor, logits_TE: Tensor, seen: _Seen, real: int) -> Tensor:
        """The weights, and behind them the gradients of the losses: sums over tokens, divided by the whole step's."""
        config, losses = self.config, []
        if config.balance_loss:
            balance = routing.balance_loss(logits_TE, seen.judged_E) * real
            seen.balance = balance.detach().double()
            losses.append(balance * (config.balance_loss / self._tokens))
        if config.z_loss:
            z = routing.z_loss(logits_TE) * real
            seen.z = z.detach().double()
            losses.append(z * (config.z_loss / self._tokens))
        return routing.carry(weights_TC, torch.stack(losses).sum(), self._loss_scale) if losses else weights_TC
