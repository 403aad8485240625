r"""Schedules: DeepSpeed's learning rates as pure functions of the last step, exactly; free of torch.

`last` counts steps from 0 and is -1 before the first one, whose rate is therefore that of -1. A schedule knows nothing
of an optimizer; `Scheduler` puts its rates into param_groups, with the methods that training scripts call.

    WarmupLR   /‾‾‾‾   WarmupDecayLR   /`-.    WarmupCosineLR   /`\     OneCycle   /\      LRRangeTest   _.-'
              /                       /    `.                  /   `-_            /  `..               -'
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ...core import ConfigError
from ...core.config import build
from ...core.errors import unknown

PerGroup = float | tuple[float, ...]
"""One number, or one for each group of parameters."""


class Schedule(Protocol):
    """What a schedule tells a group of parameters."""

    def rate(self, last: int, bases: Sequence[float], group: int) -> float:
        """The rate after step `last`; `bases` are the rates that the groups began with."""
        ...

    def betas(self, last: int) -> tuple[float, float] | None:
        """The momentum that goes with it, where it has one."""
        ...


@dataclass(frozen=True, kw_only=True)
class LRRangeTest:
    """A rate that only rises, to find where training breaks (Smith 2018)."""

    lr_range_test_min_lr: PerGroup = 1e-3
    lr_range_test_step_size: int = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    def rate(self, last: int, bases: Sequence[float], group: int) -> float:
        if last < 0:
            return _of(self.lr_range_test_min_lr, group)
        done = (last + 1) / self.lr_range_test_step_size
        rises = math.floor(done) if self.lr_range_test_staircase else done
        return _of(self.lr_range_test_min_lr, group) * (1 + self.lr_range_test_step_rate * rises)

    def betas(self, last: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Up and down once and the momentum the other way, then a decay without an end (Smith 2018)."""

    cycle_min_lr: float
    cycle_max_lr: float
    decay_lr_rate: float = 0.0
    cycle_first_step_size: int = 2000
    cycle_second_step_size: int | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: int = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0

    @property
    def _second(self) -> int:
        return self.cycle_first_step_size if self.cycle_second_step_size is None else self.cycle_second_step_size

    @property
    def _total(self) -> int:
        return self.cycle_first_step_size + self._second

    def rate(self, last: int, bases: Sequence[float], group: int) -> float:
        low, high = self.cycle_min_lr, self.cycle_max_lr
        if last < 0:
            return low
        if last < self._total:
            return low + (high - low) * self._height(last + 1)
        return low / (1 + self.decay_lr_rate * self._decays(last))

    def betas(self, last: int) -> tuple[float, float] | None:
        if not self.cycle_momentum:
            return None
        low, high = self.cycle_min_mom, self.cycle_max_mom
        if last < 0:
            return low, 0.99
        if last < self._total:
            return high - (high - low) * self._height(last + 1), 0.99
        return high * (1 + self.decay_mom_rate * self._decays(last)), 0.99

    def _decays(self, last: int) -> float:
        return (last - self._total + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _height(self, steps: int) -> float:
        """How high the cycle is after so many steps, from 0 to 1; in stairs where it has them."""
        first, at = self.cycle_first_step_size, steps % self._total
        stairs = self.cycle_first_stair_count
        rising, height = at <= first, at / first if first else 1.0
        if not rising:
            stairs = stairs if self.cycle_second_stair_count is None else self.cycle_second_stair_count
            height = (self._total - at) / self._second
        if not stairs:
            return height
        return math.floor((at * stairs / first) if rising else (self._total - at) * stairs / self._second) / stairs


@dataclass(frozen=True, kw_only=True)
class _Warmup:
    """What the three that warm up share."""

    warmup_num_steps: int = 1000
    warmup_type: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        if self.warmup_num_steps <= 0:
            raise ConfigError(f"scheduler.params.warmup_num_steps must be 1 or more, not {self.warmup_num_steps}")

    @property
    def _steps(self) -> int:
        return max(2, self.warmup_num_steps)

    def _risen(self, last: int) -> float:
        """How far the warm-up has come, from 0 to 1."""
        if self.warmup_type == "linear":
            return last / self._steps
        return math.log(last + 1) / math.log(self._steps)

    def betas(self, last: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class WarmupLR(_Warmup):
    """From the least to the greatest rate, which stays: the optimizer's (of its first group) if not said."""

    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup | None = None

    def rate(self, last: int, bases: Sequence[float], group: int) -> float:
        low = _of(self.warmup_min_lr, group)
        if last < 0:
            return low
        high = bases[0] if self.warmup_max_lr is None else _of(self.warmup_max_lr, group)
        return low + (high - low) * (self._risen(last) if last < self._steps else 1.0)


@dataclass(frozen=True, kw_only=True)
class WarmupDecayLR(_Warmup):
    """From the least to the greatest rate, then on a line to the least at `total_num_steps`."""

    total_num_steps: int
    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup = 0.001

    def rate(self, last: int, bases: Sequence[float], group: int) -> float:
        low, high = _of(self.warmup_min_lr, group), _of(self.warmup_max_lr, group)
        if last < 0:
            return low
        left = (self.total_num_steps - last) / max(1.0, self.total_num_steps - self._steps)
        return low + (high - low) * (self._risen(last) if last < self._steps else max(0.0, left))


@dataclass(frozen=True, kw_only=True)
class WarmupCosineLR(_Warmup):
    """From a part of the optimizer's rate up to it, then half a cosine down to another part."""

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    cos_min_ratio: float = 0.0001

    def rate(self, last: int, bases: Sequence[float], group: int) -> float:
        if last < 0:
            return 0.0
        if last < self._steps:
            return bases[group] * (self.warmup_min_ratio + self._risen(last) * (1.0 - self.warmup_min_ratio))
        done = min(1.0, (last - self._steps + 1) / max(1, self.total_num_steps - self._steps))
        cosine = (1 + math.cos(math.pi * done)) / 2
        return bases[group] * max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)


SCHEDULES: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


def schedule_of(kind: str, params: MutableMapping[str, Any]) -> Schedule:
    """A schedule by DeepSpeed's name and numbers.

    Raises:
        ConfigError: a name, a key or a value that it does not know.
    """
    if kind not in SCHEDULES:
        raise ConfigError(unknown("scheduler.type", kind, SCHEDULES))
    schedule: Schedule = build(SCHEDULES[kind], params, "scheduler.params.")
    return schedule


def _of(value: PerGroup, group: int) -> float:
    if not isinstance(value, tuple):
        return value
    if group >= len(value):
        raise ConfigError(f"the scheduler has numbers for {len(value)} groups of parameters, the optimizer has more")
    return value[group]


class Scheduler:
    """A schedule at work on an optimizer's groups, with the face of DeepSpeed's schedulers."""

    def __init__(self, groups: Sequence[MutableMapping[str, Any]], schedule: Schedule, last: int = -1) -> None:
        self.schedule, self._groups = schedule, groups
        self.bases = [float(group.get("initial_lr", group["lr"])) for group in groups]
        self.last_batch_iteration = last
        self._put()

    def step(self, last_batch_iteration: int | None = None) -> None:
        """After a step that was taken: on to the next rate, or to that of a given step."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if last_batch_iteration is None else last_batch_iteration
        self._put()

    def get_lr(self) -> list[float]:
        """Each group's rate."""
        return [self.schedule.rate(self.last_batch_iteration, self.bases, at) for at in range(len(self.bases))]

    def get_last_lr(self) -> list[float]:
        """The same; nothing is kept that could differ."""
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self._put()

    def _put(self) -> None:
        betas = self.schedule.betas(self.last_batch_iteration)
        for group, rate in zip(self._groups, self.get_lr(), strict=True):
            group["lr"] = rate
            if betas is not None and "betas" in group:
                group["betas"] = betas
