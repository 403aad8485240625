"""Door: `initialize`, with DeepSpeed's arguments and order: a module and a ds_config in, an engine out.

environment ─▶ ranks ─▶ ds_config resolved ─▶ weights of rank 0 everywhere ─▶ FSDP2 ─▶ masters ─▶ optimizer, schedule
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ...core import ConfigError
from ...parallel import Mesh, Ranks, discover, joined
from ...parallel.layout import lay_out
from ..offload import Offload
from ..peers import peers_of
from ..zero import Zero
from .blocks import blocks_of
from .config import DeepSpeedConfig, Dtype, RuleConfig, resolve
from .engine import DTYPES, Engine, Scheduling
from .masters import Masters
from .optimizer import NamedGroups, RuleOptimizer, check_sliced, moved, muon_names, named_groups
from .schedules import Scheduler

Settings = str | Path | Mapping[str, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Settings | None = None,
    mesh_param: Any = None,
    config_params: Settings | None = None,
) -> tuple[Engine, torch.optim.Optimizer | None, Any, Any]:
    """Train any module by a ds_config: (engine, optimizer, dataloader, schedule), as deepspeed.initialize returns them.

    The module is divided in place. Processes meet as their launcher's environment says (torchrun, Slurm, MPI), unless
    they have met already; alone, no process group is needed. A client's `optimizer` or `lr_scheduler` (an object, or a
    function of parameters or optimizer that makes one) goes before the ds_config's.

    Raises:
        ConfigError: a key of the ds_config that is unknown, refused or at odds with another, or arguments that are.
    """
    config = config or config_params or getattr(args, "deepspeed_config", None)
    if model is None or config is None:
        raise ConfigError("initialize needs model= and config= (a ds_config as a file or a dict)")
    if mpu is not None or mesh_param is not None:
        raise ConfigError("mpu and mesh_param: a module is divided over data-parallel ranks alone; leave them out")
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = _meet(device_type, distributed_port, dist_init_required)
    settings = resolve(config, ranks.world, _dtype(model), accelerator=device_type != "cpu")
    mesh = Mesh(lay_out(settings.parallel, ranks.world, ranks.local_world), ranks.rank, device_type)
    device = torch.device(device_type, ranks.local_rank) if device_type == "cuda" else torch.device("cpu")
    model.to(device)

    rule = settings.optimizer if optimizer is None else None
    groups = _groups(model, optimizer, model_parameters, rule)
    zero, masters = _divide(model, settings, mesh, [name for group in groups for name in group["params"]])
    made = _optimizer(optimizer, rule, groups, masters)
    if made is not None and rule is None and settings.offload.optimizer != "none":
        raise ConfigError("offload_optimizer is for the ds_config's optimizer.type: a client's has its states itself")
    if made is not None:
        check_sliced(made, settings.stage if not mesh.alone else 0, settings.untested)
    schedule = _schedule(lr_scheduler, settings, made)
    engine = Engine(
        model, settings, mesh, zero, masters, ranks=ranks, device=device, optimizer=made, lr_scheduler=schedule
    )
    handed = (("optimizer", optimizer, settings.optimizer), ("scheduler", lr_scheduler, settings.schedule))
    unused = [
        f"the ds_config's {what}: initialize was handed one" for what, one, other in handed if one is not None and other
    ]
    for note in (*settings.notes, *(f"not used is {text}" for text in unused)):
        engine.say(note)
    if training_data is not None:
        engine.training_dataloader = Loader(training_data, settings, mesh, collate_fn)
    return engine, made, engine.training_dataloader, schedule


def init_distributed(dist_backend: str | None = None, **kwargs: Any) -> None:
    """Meet the other processes before `initialize`, which else does it; the backend follows from the machine."""
    _meet("cuda" if torch.cuda.is_available() else "cpu", kwargs.get("distributed_port"), None)


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags that `initialize(args=...)` and DeepSpeed's launcher know."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="for the script's own use: nothing depends on it")
    group.add_argument("--deepspeed_config", default=None, help="the ds_config, a JSON file")
    return parser


def _meet(device: str, port: int | None, required: bool | None) -> Ranks:
    """Who this is, joined with the others; parted from them when the process ends."""
    ranks = discover()
    if dist.is_initialized():
        world = dist.get_world_size()
        return dataclasses.replace(
            ranks if ranks.world == world else Ranks(world=world, local_world=world), rank=dist.get_rank(), world=world
        )
    if ranks.world > 1:
        if required is False:
            raise ConfigError("dist_init_required is False, and torch.distributed is not initialized")
        if port is not None and ranks.launcher != "torchrun":
            ranks = dataclasses.replace(ranks, port=port)
        stack = ExitStack()
        stack.enter_context(joined(ranks, device))
        atexit.register(stack.close)
    return ranks


def _dtype(model: nn.Module) -> Dtype:
    """What the module's floating weights are; fp32 where they are of several kinds, or of none that is narrower."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    strange = [dtype for dtype in found if dtype not in names]
    if strange or len(found) > 1:
        listed = ", ".join(sorted(str(dtype) for dtype in found))
        raise ConfigError(
            f"the module's weights are {listed}: make them one of fp32, bf16 and fp16, e.g. model.float()"
        )
    return cast(Dtype, names[found.pop()]) if found else "fp32"


def _groups(model: nn.Module, optimizer: Any, parameters: Any, rule: RuleConfig | None) -> NamedGroups:
    """Groups of parameters by name, before FSDP2 puts others in their place; none without an optimizer."""
    if optimizer is None and rule is None:
        return []
    handed = isinstance(optimizer, torch.optim.Optimizer)
    groups = named_groups(model, optimizer.param_groups if handed else parameters)
    if rule is not None and rule.name == "muon":
        turned = muon_names(model)
        for group in groups:
            group["use_muon"] = [name for name in group["params"] if name in turned]
    return groups


@torch.no_grad()
def _divide(
    model: nn.Module, settings: DeepSpeedConfig, mesh: Mesh, names: list[str]
) -> tuple[Zero[nn.Module], Masters]:
    """The first rank's weights on all, in fp32, divided by the stage; and the masters of those that are trained."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.float()
    for tensor in (*model.parameters(), *model.buffers()):
        mesh.broadcast(tensor.data)
    narrow = None if settings.dtype == "fp32" else DTYPES[settings.dtype]
    zero = Zero(model, mesh, narrow, config=settings.parallel, blocks=blocks_of(model))
    return zero, Masters(model, names, mesh, None if zero.parts else narrow, Offload(settings.offload))


def _optimizer(
    optimizer: Any, rule: RuleConfig | None, groups: NamedGroups, masters: Masters
) -> torch.optim.Optimizer | None:
    if isinstance(optimizer, torch.optim.Optimizer):
        moved(optimizer, groups, masters.params)
        return optimizer
    if optimizer is not None:
        made: torch.optim.Optimizer = optimizer(
            [{**group, "params": [masters.params[name] for name in group["params"]]} for group in groups]
        )
        return made
    return (
        None
        if rule is None
        else RuleOptimizer(groups, rule, masters.params, peers_of(masters.weights), masters.offload)
    )


def _schedule(client: Any, settings: DeepSpeedConfig, optimizer: torch.optim.Optimizer | None) -> Scheduling | None:
    if client is not None:
        return cast(Scheduling, client(optimizer) if callable(client) and not hasattr(client, "step") else client)
    if settings.schedule is None:
        return None
    if optimizer is None:
        raise ConfigError("the ds_config has a scheduler and no optimizer whose rate it could set")
    return Scheduler(optimizer.param_groups, settings.schedule, settings.last_step)


class Loader:
    """Batches of this rank's share of a dataset, in another order each time through."""

    def __init__(
        self, data: Dataset[Any], settings: DeepSpeedConfig, mesh: Mesh, collate: Callable[[list[Any]], Any] | None
    ) -> None:
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            data, mesh.size("data"), mesh.rank("data"), drop_last=settings.drop_last
        )
        self._loader = DataLoader(
            data, settings.micro_batch, sampler=self._sampler, collate_fn=collate, drop_last=settings.drop_last
        )
        self._round = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._sampler.set_epoch(self._round)
        self._round += 1
        return iter(self._loader)
