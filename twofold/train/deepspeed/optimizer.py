"""Twofold's rules behind the face of a torch optimizer, and a client's optimizer moved to where the masters are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core import ConfigError
from ...kernels.optimizer import Shard
from ..offload import Offload
from ..peers import Peers
from ..rules import Adagrad, Adam, AdamW, Lamb, Lion, Muon, Rule, Sgd
from .config import RuleConfig

ELEMENTWISE = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    *("FusedAdam", "DeepSpeedCPUAdam", "Lion"),
}
"""Optimizers by class name that do on slices what they do on wholes."""

NamedGroups = list[dict[str, Any]]
"""Groups of parameters, as torch has them, with the parameters' names under "params"."""


class RuleOptimizer(torch.optim.Optimizer):
    """A rule of `train/rules.py` over groups of masters; rates and betas are read from `param_groups` at each step.

    What the rule keeps is in memory, or where `offload` keeps it, and then worked on tile by tile.
    """

    def __init__(
        self,
        groups: NamedGroups,
        config: RuleConfig,
        masters: Mapping[str, nn.Parameter],
        peers: Peers,
        offload: Offload | None = None,
    ) -> None:
        self._names = {master: name for name, master in masters.items()}
        self._peers, self._offload = peers, offload or Offload()
        split = [part for group in groups for part in _split(group, config, masters)]
        super().__init__([{**group, "params": [masters[name] for name in group["params"]]} for group in split], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """Move every master that has a gradient; gradients count times `scale`."""
        if closure is not None:
            raise ConfigError("the engine makes the gradients: call engine.backward(loss), then engine.step()")
        for group in self.param_groups:
            rule = self._rule(group)
            due = [master for master in group["params"] if master.grad is not None]
            shards = [self._shard(master, rule, group) for master in due]
            for some in self._offload.tiles(shards, whole=not rule.elementwise):
                rule.step(some, float(group["lr"]), scale)

    def _shard(self, master: nn.Parameter, rule: Rule, group: dict[str, Any]) -> Shard:
        state = self._state(master, rule)
        state["step"] += 1
        assert master.grad is not None
        return Shard(
            weight=master.detach(),
            grad=master.grad,
            states=tuple(state[key] for key in rule.states),
            steps=int(state["step"]),
            decay=float(group["weight_decay"]),
            name=self._names[master],
        )

    def _state(self, master: nn.Parameter, rule: Rule) -> dict[str, Any]:
        """What is kept of a master, made when it is first asked for."""
        state: dict[str, Any] = self.state[master]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state |= {key: self._zeros(f"{key}.{self._names[master]}", master) for key in rule.states}
        return state

    def _zeros(self, name: str, master: Tensor) -> Tensor:
        return self._offload.zeros(name, master.shape) if self._offload.keeps_states else torch.zeros_like(master)

    @torch.no_grad()
    def fill(self, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Put states that were saved where states are; what has none begins anew."""
        for group in self.param_groups:
            rule = self._rule(group)
            for master in group["params"]:
                saved = states.get(master)
                if saved is None and master not in self.state:
                    continue
                for key, place in self._state(master, rule).items():
                    place.copy_(saved[key]) if saved is not None else place.zero_()
        self._offload.settle()

    def _rule(self, group: dict[str, Any]) -> Rule:
        match group["rule"]:
            case "adamw":
                return AdamW(betas=_pair(group["betas"]), eps=group["eps"])
            case "adam":
                return Adam(betas=_pair(group["betas"]), eps=group["eps"])
            case "lion":
                return Lion(betas=_pair(group["betas"]))
            case "adagrad":
                return Adagrad(eps=group["eps"])
            case "sgd":
                return Sgd(momentum=group["momentum"], nesterov=group["nesterov"])
            case "lamb":
                trust = (group["min_coeff"], group["max_coeff"])
                return Lamb(betas=_pair(group["betas"]), eps=group["eps"], trust=trust, peers=self._peers)
        whole = {self._names[master]: ((slice(None), slice(None)),) for master in group["params"]}
        return Muon(momentum=group["momentum"], nesterov=True, adjust="original", parts=whole, peers=self._peers)


def _pair(values: Iterable[float]) -> tuple[float, float]:
    first, second = values
    return float(first), float(second)


def _split(group: dict[str, Any], config: RuleConfig, masters: Mapping[str, nn.Parameter]) -> NamedGroups:
    """A group with the rule's numbers behind its own; of Muon, its matrices and the rest, which is AdamW's."""
    numbers = dict(config.numbers)
    if config.name != "muon":
        return [{"rule": config.name, **numbers, **group}]
    rates = {"muon": numbers.pop("muon_lr"), "adamw": numbers.pop("adam_lr")}
    turned = set(group.pop("use_muon"))
    wrong = next((name for name in group["params"] if name in turned and masters[name].ndim != 2), None)
    if wrong:
        raise ConfigError(
            f"Muon turns matrices, and '{wrong}' has {masters[wrong].ndim} dimensions: set use_muon = False"
        )
    parts = {
        "muon": [n for n in group["params"] if n in turned],
        "adamw": [n for n in group["params"] if n not in turned],
    }
    return [
        {"rule": rule, "lr": rates[rule], **numbers, **group, "params": names} for rule, names in parts.items() if names
    ]


# --------------------------------------------------------------------------------------------- what a client hands in
def named_groups(module: nn.Module, parameters: Any) -> NamedGroups:
    """Groups by name, of what a client says are the parameters: none (all that are trained), tensors, or dicts.

    Raises:
        ConfigError: a tensor that is not the module's, or one in two groups.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    given: list[Any] = [p for p in module.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if given and not isinstance(given[0], Mapping):
        given = [{"params": given}]
    groups: NamedGroups = []
    seen: set[str] = set()
    for group in given:
        tensors = group["params"]
        mine = []
        for tensor in [tensors] if isinstance(tensors, Tensor) else list(tensors):
            name = names.get(id(tensor))
            if name is None:
                raise ConfigError(
                    "model_parameters has a tensor that is no parameter of the model: take model.parameters()"
                )
            if name in seen:
                raise ConfigError(f"model_parameters has '{name}' twice: put it in one group")
            seen.add(name)
            if tensor.requires_grad:
                mine.append(name)
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": mine})
    if not any(group["params"] for group in groups):
        raise ConfigError("no parameter is trained: all have requires_grad = False")
    return groups


def muon_names(module: nn.Module) -> set[str]:
    """What the client marked with `use_muon`; where nothing is marked, all matrices but embeddings and the head."""
    marks = {name: p.use_muon for name, p in module.named_parameters() if hasattr(p, "use_muon")}
    if marks:
        return {name for name, mark in marks.items() if mark}
    tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    matrices = {name for name, p in module.named_parameters() if p.ndim == 2}
    return {name for name in matrices - tables if "embed" not in name.lower() and "lm_head" not in name.lower()}


def moved(optimizer: torch.optim.Optimizer, groups: NamedGroups, masters: Mapping[str, nn.Parameter]) -> None:
    """Give a client's optimizer the masters in place of the parameters that it was made with.

    Raises:
        ConfigError: it has stepped already.
    """
    if optimizer.state:
        raise ConfigError("the optimizer has stepped already: hand in a new one, and load_checkpoint brings its state")
    for group, named in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [masters[name] for name in named["params"]]


def check_sliced(optimizer: torch.optim.Optimizer, stage: int, untested: bool) -> None:
    """Raises ConfigError when an optimizer may do another thing on slices than on wholes, and nobody allowed it."""
    name = type(optimizer).__name__
    if stage and not untested and name not in ELEMENTWISE and not isinstance(optimizer, RuleOptimizer):
        raise ConfigError(
            f"{name} is not known to work on slices of tensors, which is what a rank has at ZeRO stage {stage}: take "
            "optimizer.type of the ds_config or stage 0, or set zero_allow_untested_optimizer if it is elementwise"
        )
