"""Config: what a ds_config means here; free of torch.

file or dict ─▶ every key checked ─▶ "auto" ─▶ the batch-size triangle ─▶ DeepSpeedConfig, and notes of what was chosen
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core import ConfigError
from ...parallel import ParallelConfig
from ..offload_config import OffloadConfig
from ..scaler import LossScaleConfig
from .check import TRIANGLE, Values, check, read
from .keys import rows
from .schedules import SCHEDULES, Schedule, schedule_of

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """A rule of `train/rules.py` and its numbers, "lr" and "weight_decay" among them, with DeepSpeed's defaults."""

    name: str
    numbers: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What a ds_config means here, checked and complete."""

    train_batch: int
    micro_batch: int
    accumulation: int
    managed: bool
    clip: float
    mean: bool
    """Whether gradients are averaged over ranks; else added up."""
    dtype: Dtype
    """What weights are multiplied in."""
    fp16: LossScaleConfig | None
    cast_inputs: bool
    autocast: str | None
    """The dtype of torch.autocast around forward."""
    stage: int
    parallel: ParallelConfig
    optimizer: RuleConfig | None
    offload: OffloadConfig
    schedule: Schedule | None
    last_step: int
    untested: bool
    host_activations: bool
    drop_last: bool
    print_every: int | None
    clock: bool
    csv: Path | None
    tensorboard: Path | None
    tags: Literal["warn", "ignore", "fail"]
    notes: tuple[str, ...]
    """What "auto" and the triangle came to, one line each."""


def resolve(
    config: str | Path | Mapping[str, Any], world: int, dtype: Dtype = "fp32", accelerator: bool = False
) -> DeepSpeedConfig:
    """What a ds_config means for `world` ranks and a module whose weights are `dtype`.

    Raises:
        ConfigError: a key that is unknown, refused, of the wrong kind, or at odds with another; it says what to do.
    """
    table, notes = Values(check(read(config))), []
    notes += table.choose(dtype)
    given = [table[key] for key in TRIANGLE]
    train, micro, steps = triangle(given[0], given[1], given[2], world)
    notes.append(f"train_batch_size {train} = {micro} a rank x {steps} micro-batches x {world} ranks")
    narrow, autocast = _precision(table, dtype)
    scaling = {key: table[f"fp16.{key}"] for key in LossScaleConfig.__dataclass_fields__}
    schedule, last = _schedule(table)
    return DeepSpeedConfig(
        train_batch=train,
        micro_batch=micro,
        accumulation=steps,
        managed=table["managed_gradient_accumulation"],
        clip=_at_least("gradient_clipping", table["gradient_clipping"], 0.0),
        mean=table["gradient_allreduce_op"] == "mean",
        dtype=narrow,
        fp16=LossScaleConfig(**scaling) if narrow == "fp16" else None,
        cast_inputs=narrow == "fp16" and table["fp16.auto_cast"],
        autocast=autocast,
        stage=table["zero_optimization.stage"],
        parallel=_parallel(table, world),
        optimizer=_rule(table),
        offload=_offload(table, accelerator),
        schedule=schedule,
        last_step=last,
        untested=table["zero_allow_untested_optimizer"],
        host_activations=table["activation_checkpointing.cpu_checkpointing"],
        drop_last=table["dataloader_drop_last"],
        print_every=table["steps_per_print"],
        clock=table["wall_clock_breakdown"],
        csv=_sink(table, "csv_monitor", "csv_logs"),
        tensorboard=_sink(table, "tensorboard", "runs"),
        tags=table["checkpoint.tag_validation"].lower(),
        notes=tuple(notes),
    )


# --------------------------------------------------------------------------------------------- what keys come to
def _precision(table: Values, dtype: Dtype) -> tuple[Dtype, str | None]:
    """What weights are multiplied in, and the dtype of autocast."""
    narrow: Dtype = "bf16" if table["bf16.enabled"] else "fp16" if table["fp16.enabled"] else "fp32"
    if table["bf16.enabled"] and table["fp16.enabled"]:
        raise ConfigError("bf16.enabled and fp16.enabled are both true: keep one")
    if narrow == "fp32" and dtype != "fp32":
        raise ConfigError(
            f"the module's weights are {dtype}, the ds_config says fp32: enable {dtype}, or module.float()"
        )
    autocast = table["torch_autocast.dtype"] if table["torch_autocast.enabled"] else None
    if autocast and narrow != "fp32":
        raise ConfigError(f"torch_autocast is for fp32 weights, and {narrow}.enabled is true: keep one")
    return narrow, autocast


def _schedule(table: Values) -> tuple[Schedule | None, int]:
    """The schedule, and the step it goes on from."""
    kind, params = table["scheduler.type"], table.block("scheduler.params")
    if kind is None and params:
        raise ConfigError(f"scheduler.params without a scheduler.type: name one of {', '.join(SCHEDULES)}")
    last = params.pop("last_batch_iteration", -1)
    return None if kind is None else schedule_of(kind, params), last


def triangle(train: int | None, micro: int | None, steps: int | None, world: int) -> tuple[int, int, int]:
    """Batch of a step, of a rank's micro-batch, and micro-batches, from what is given of them.

    Raises:
        ConfigError: neither batch is given, one is not 1 or more, or they contradict each other; with the numbers.
    """
    for name, value in zip(TRIANGLE, (train, micro, steps)):
        if value is not None and value < 1:
            raise ConfigError(f"'{name}' must be 1 or more, not {value}")
    if train is None and micro is None:
        raise ConfigError("the ds_config needs train_batch_size or train_micro_batch_size_per_gpu")
    if train is None:
        assert micro is not None
        return micro * (steps or 1) * world, micro, steps or 1
    if micro is not None and steps is not None:
        if micro * steps * world != train:
            raise ConfigError(
                f"train_batch_size {train} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
                f"{steps} x {world} ranks = {micro * steps * world}: leave one out, or set train_batch_size to that"
            )
        return train, micro, steps
    known, name = (micro, TRIANGLE[1]) if micro is not None else (steps or 1, TRIANGLE[2])
    if train % (known * world):
        near = max(1, round(train / (known * world))) * known * world
        raise ConfigError(
            f"train_batch_size {train} is not a multiple of {name} {known} x {world} ranks = {known * world}: "
            f"the nearest that is: {near}"
        )
    other = train // (known * world)
    return (train, known, other) if micro is not None else (train, other, known)


def _parallel(table: Values, world: int) -> ParallelConfig:
    stage = table["zero_optimization.stage"]
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"'zero_optimization.stage' must be 0, 1, 2 or 3, not {stage}")
    weights, grads = (table[f"zero_optimization.zero_quantized_{what}"] for what in ("weights", "gradients"))
    if weights != grads:
        raise ConfigError(
            "zero_quantized_weights and zero_quantized_gradients go together here, as int8 both ways: set both, or none"
        )
    if weights and not stage:
        raise ConfigError(
            "zero_quantized_weights and _gradients narrow what ZeRO sends, and stage 0 is none: set a stage"
        )
    node = max(table["zero_optimization.zero_hpz_partition_size"], table["zero_optimization.mics_shard_size"])
    if node > 1 and stage != 3:
        raise ConfigError(f"zero_hpz_partition_size and mics_shard_size are for stage 3, and the stage is {stage}")
    return ParallelConfig(
        zero="hybrid" if 1 < node < world else stage,
        node=node if 1 < node < world else None,
        comm="int8" if weights and world > 1 else "plain",
    )


def _offload(table: Values, accelerator: bool) -> OffloadConfig:
    """Where the optimizer's states are; a machine without an accelerator has all in the host's memory anyway."""
    states, weights = (f"zero_optimization.offload_{what}" for what in ("optimizer", "param"))
    if table[f"{weights}.device"] == "nvme" or (table[f"{weights}.device"] == "cpu" and accelerator):
        raise ConfigError(
            f"'{weights}.device': a module's parameters stay where they are used: leave it out, and raise the stage or "
            "the number of ranks; a recipe (`twofold train`) keeps a decoder's elsewhere by its [offload] table"
        )
    place = table[f"{states}.device"]
    if place == "nvme" and table[f"{states}.nvme_path"] is None:
        raise ConfigError(f"'{states}.device' is nvme: set {states}.nvme_path to a directory on a fast disk")
    if place == "nvme":
        directory, buffers = Path(table[f"{states}.nvme_path"]), table[f"{states}.buffer_count"]
        return OffloadConfig(optimizer="disk", directory=directory, buffers=buffers)
    return OffloadConfig(optimizer="host" if place == "cpu" and accelerator else "none")


_BETAS = {"betas": (0.9, 0.999), "eps": 1e-8}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("adamw", {"lr": 1e-3, **_BETAS}),
    "adamw": ("adamw", {"lr": 1e-3, **_BETAS}),
    "lamb": ("lamb", {"lr": 1e-3, **_BETAS, "max_coeff": 10.0, "min_coeff": 0.01}),
    "lion": ("lion", {"lr": 1e-3, "betas": (0.9, 0.99)}),
    "adagrad": ("adagrad", {"lr": 1e-2, "eps": 1e-10}),
    "sgd": ("sgd", {"lr": 1e-3, "momentum": 0.0, "nesterov": False}),
    "muon": (
        "muon",
        {"lr": None, "muon_lr": 0.02, "momentum": 0.95, "adam_lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10},
    ),
}
"""DeepSpeed's types in small letters: the rule, and the numbers that it takes with DeepSpeed's defaults."""


def _rule(table: Values) -> RuleConfig | None:
    kind = table["optimizer.type"]
    params = table.block("optimizer.params")
    if kind is None:
        if params:
            raise ConfigError(f"optimizer.params without an optimizer.type: name one of {', '.join(OPTIMIZERS)}")
        return None
    if kind.lower() not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.type '{kind}' is none of {', '.join(OPTIMIZERS)}: hand a torch optimizer in as "
            "initialize(optimizer=...)"
        )
    name, numbers = OPTIMIZERS[kind.lower()]
    numbers = {**numbers, "weight_decay": 0.0}
    if kind.lower() == "adam" and not params.pop("adam_w_mode", True):
        name = "adam"
    ours = {key for key in params if rows()[f"optimizer.params.{key}"][0].answer == "mapped"} - {"adam_w_mode"}
    for key in sorted(ours - numbers.keys()):
        raise ConfigError(f"'optimizer.params.{key}' means nothing to {kind}, which takes {', '.join(sorted(numbers))}")
    numbers |= {key: params[key] for key in ours}
    if name == "muon":  # each kind of group has a rate of its own
        both = numbers.pop("lr")
        numbers |= {key: both for key in ("muon_lr", "adam_lr") if both is not None and key not in ours}
    if "betas" in numbers:
        numbers["betas"] = _betas(numbers["betas"])
    return RuleConfig(name=name, numbers=numbers)


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in value):
        raise ConfigError(f"'optimizer.params.betas' must be two numbers in [0, 1), not {value!r}")
    return float(value[0]), float(value[1])


def _sink(table: Values, name: str, folder: str) -> Path | None:
    if not table[f"{name}.enabled"]:
        return None
    return Path(table[f"{name}.output_path"] or folder) / str(table[f"{name}.job_name"])


def _at_least(path: str, value: float, least: float) -> float:
    if value < least:
        raise ConfigError(f"'{path}' must be {least:g} or more, not {value}")
    return float(value)
