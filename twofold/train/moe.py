"""Routers: a decoder's mixtures while they train. Between `begin` and `end` of a step they deal tokens by the recipe's
rules and count; outside a step the decoder chooses as it is served.

    begin(step, tokens)                       the rules are in force
        forward of each micro-batch           choose -> count -> losses join the backward pass -> drop
    end(moved)                                counts of all ranks -> biases move -> figures for the journal

What a layer saw is kept with the context of its micro-batch, so that a layer that is run again for its gradient counts
once and is judged by the same counts.

Shapes: T tokens, D hidden size, E experts, C experts chosen for a token.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import ConfigError
from ..data.pack import NOBODY
from ..kernels.moe import route, weights_of
from ..models.context import AttnContext
from ..models.decoder import Decoder, Layer
from ..models.spec import Mixture
from ..parallel.comm import part_of
from . import routing
from .moe_config import MoeConfig

Group = dist.ProcessGroup | None


class Routers:
    """The mixtures of a decoder, dealt by `config`.

    `group` are the ranks that have other tokens of the same layers, `within` those that keep parts of each other's
    tokens between the matrices of tensor parallel.

    Raises:
        ConfigError: rules for a model without mixtures, or biases for a family whose checkpoints have none.
    """

    def __init__(
        self, decoder: Decoder, config: MoeConfig, seed: int, group: Group = None, within: Group = None
    ) -> None:
        self.config, self.seed, self.group, self.within = config, seed, group, within
        spec = decoder.spec
        every = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, Mixture)]
        if not every and config != MoeConfig():
            raise ConfigError(f"{spec.architecture} has no mixture of experts: take the table [moe] out of the recipe")
        if config.bias_rate and not all(ffn.biased for ffn in every):
            raise ConfigError(
                f"moe.bias_rate: checkpoints of {spec.architecture} have no bias for the choice of experts, so the "
                "model would be served by other experts than it was trained with: give model.config the architecture "
                "Ernie4_5_MoeForCausalLM, or use moe.balance_loss"
            )
        self.mixtures = {
            layer: layer.spec.ffn
            for layer in decoder.layers
            if isinstance(layer, Layer) and isinstance(layer.spec.ffn, Mixture)
        }
        self._step, self._tokens, self._loss_scale = 0, 1, 1.0
        self._judged: WeakKeyDictionary[AttnContext, dict[int, Tensor]] = WeakKeyDictionary()
        self._kept: WeakKeyDictionary[AttnContext, set[int]] = WeakKeyDictionary()
        self._counts: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._so_far: dict[int, Tensor] = {}

    def begin(self, step: int, tokens: int, loss_scale: float = 1.0) -> None:
        """Put the rules in force for step `step`, whose batch has `tokens` tokens on all ranks together.

        `loss_scale` is what the step's loss is multiplied by before its backward pass.
        """
        self._step, self._tokens, self._loss_scale = step, tokens, loss_scale
        for held in (self._judged, self._kept, self._counts, self._sums, self._so_far):
            held.clear()
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
                bias.copy_(routing.moved(bias, counts_E, self.config.bias_rate))
        return self._figures([(counts_E.tolist(), sums.tolist()) for counts_E, sums in totals.values()])

    def _totals(self) -> dict[Layer, tuple[Tensor, Tensor]]:
        """Each layer's counts [E] and sums [3] over the step's micro-batches and ranks, in one message."""
        rows: list[Tensor] = []
        for layer, ffn in self.mixtures.items():
            none = torch.zeros(ffn.experts + 3, dtype=torch.float64, device=layer.router.device)
            counts, sums = self._counts.get(layer.index), self._sums.get(layer.index)
            rows.append(none if counts is None or sums is None else torch.cat((counts.double(), sums)))
        if not rows:
            return {}
        flat = self._added(torch.cat(rows))
        parts: list[Tensor] = list(torch.split(flat, [len(row) for row in rows]))
        return {layer: (part[:-3], part[-3:]) for layer, part in zip(self.mixtures, parts)}

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

    def _added(self, x: Tensor) -> Tensor:
        """The sum over all ranks that have other tokens."""
        x = x.clone()
        for group in (self.group, self.within):
            if group is not None:
                dist.all_reduce(x, group=group)
        return x

    # ------------------------------------------------------------------------------------------ one layer's forward
    def _route(self, layer: Layer, x_TD: Tensor, ctx: AttnContext) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights by the rules; stands in for `Layer.route`."""
        config, ffn = self.config, self.mixtures[layer]
        places_T = self._places(ctx, x_TD)
        key = routing.key_of(self.seed, self._step, layer.index)
        if config.noise == "jitter":
            x_TD = routing.jitter(x_TD, key, places_T, config.jitter)
        logits_TE = layer.router(x_TD)
        bias_E = layer.choice.bias[0] if ffn.biased else None
        if config.noise == "gumbel":
            drawn_TE = routing.gumbel(logits_TE.detach(), key, places_T)
            _, experts_TC = route(drawn_TE, ffn.top_k, False, bias_E)
            weights_TC = weights_of(logits_TE, experts_TC, ffn.renormalise)
        else:
            weights_TC, experts_TC = route(logits_TE, ffn.top_k, ffn.renormalise, bias_E)
        counted_TC = torch.where((places_T != NOBODY)[:, None], experts_TC, -1)
        weights_TC, sums = self._with_losses(layer, ctx, weights_TC, logits_TE.float(), counted_TC)
        if config.capacity is not None:
            most = routing.capacity_of(experts_TC.numel(), ffn.experts, config.capacity, config.min_capacity)
            fits_TC = routing.within(weights_TC, counted_TC, ffn.experts, most, config.drop)
            sums[0] = ((counted_TC >= 0) & ~fits_TC).sum()
            weights_TC, experts_TC = weights_TC * fits_TC, torch.where(fits_TC, experts_TC, -1)
        self._keep(layer, ctx, counted_TC, sums)
        return weights_TC, experts_TC

    def _places(self, ctx: AttnContext, x_TD: Tensor) -> Tensor:
        """Where each token stands in the step's batch."""
        known: Tensor | None = getattr(ctx, "places_T", None)
        places_T = torch.arange(len(x_TD)) if known is None else known
        if self.within is not None:
            places_T = part_of(places_T, self.within, 0)
        return places_T.to(x_TD.device)

    def _with_losses(
        self, layer: Layer, ctx: AttnContext, weights_TC: Tensor, logits_TE: Tensor, counted_TC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weights, the losses' gradients behind them, and sums over tokens: (room for the dropped, balance, z).

        The losses are divided by the whole step's tokens.
        """
        config, losses = self.config, []
        sums = torch.zeros(3, dtype=torch.float64, device=logits_TE.device)
        real_T = counted_TC[:, 0] >= 0
        if config.balance_loss:
            balance = (routing.balance_loss(logits_TE, self._judge(layer, ctx, counted_TC)) * real_T).sum()
            sums[1] = balance.detach()
            losses.append(balance * (config.balance_loss / self._tokens))
        if config.z_loss:
            z = (routing.z_loss(logits_TE) * real_T).sum()
            sums[2] = z.detach()
            losses.append(z * (config.z_loss / self._tokens))
        if losses:
            weights_TC = routing.carry(weights_TC, torch.stack(losses).sum(), self._loss_scale)
        return weights_TC, sums

    def _judge(self, layer: Layer, ctx: AttnContext, counted_TC: Tensor) -> Tensor:
        """The counts that this micro-batch's balance is judged by."""
        known = self._judged.setdefault(ctx, {})
        if layer.index not in known:
            counts_E = routing.counts_of(counted_TC, self.mixtures[layer].experts)
            if self.config.over == "step":
                counts_E = self._added(counts_E) + self._so_far.get(layer.index, 0)
                self._so_far[layer.index] = counts_E
            known[layer.index] = counts_E
        return known[layer.index]

    def _keep(self, layer: Layer, ctx: AttnContext, counted_TC: Tensor, sums: Tensor) -> None:
        """Add up what was seen, the first time that it is."""
        seen, index = self._kept.setdefault(ctx, set()), layer.index
        if index in seen:
            return
        seen.add(index)
        counts_E = routing.counts_of(counted_TC, self.mixtures[layer].experts)
        self._counts[index] = self._counts.get(index, 0) + counts_E
        self._sums[index] = self._sums.get(index, 0) + sums
