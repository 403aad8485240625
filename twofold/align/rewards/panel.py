"""Panel: all rewards of a run, each in its own process, at work at the same time. A reward that fails never ends a run.

Part of the rewards interface of TRL (`None` leaves a completion out of one reward), with a process for each function.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from ...core import ConfigError, unknown
from . import wire
from .config import RewardConfig, check_names
from .function import one_line
from .process import RewardProcess


class RewardModel(Protocol):
    """A reward model as a panel calls it, in the panel's own process and in the calling thread."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Sequence[float | None]:
        """One value for each completion, in order; None leaves it out."""
        ...


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the panel said of one batch; entry i of every list belongs to completion i."""

    totals: list[float | None]
    """Sum of weight times value over the parts that gave one; None where no part did."""
    parts: dict[str, list[float | None]]
    """Values by reward, unweighted."""
    faults: dict[str, Counter[str]]
    """By reward: how many completions it left without a value (or judged late), by reason."""
    notes: list[str] = field(default_factory=list)
    """One line for each kind of fault that this panel had not yet spoken of."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`<reward>.<metric>`: what functions logged."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """`<reward>.<column>`: what functions logged of each completion."""

    @property
    def fault_counts(self) -> dict[str, int]:
        """Completions without a value, by reward: a line of the journal."""
        return {name: sum(reasons.values()) for name, reasons in self.faults.items()}

    @property
    def means(self) -> dict[str, float]:
        """The mean value of each reward over the completions that it judged; a reward that judged none is absent."""
        given = {name: [v for v in values if v is not None] for name, values in self.parts.items()}
        return {name: sum(values) / len(values) for name, values in given.items() if values}


class Panel:
    """Start with the configs of a run, `score` batches, `close`; or use it in a `with`.

    Raises:
        ConfigError: two rewards of one name, or a model that `models` does not have.
    """

    def __init__(self, configs: Sequence[RewardConfig], models: Mapping[str, RewardModel] | None = None) -> None:
        check_names(tuple(configs))
        self._configs = tuple(configs)
        self._models = dict(models or {})
        for config in self._configs:
            if config.kind == "model" and config.model not in self._models:
                raise ConfigError(f"reward '{config.name}': " + unknown("reward model", config.model, self._models))
        others = [config for config in self._configs if config.kind != "model"]
        self._processes = {config.name: RewardProcess(config) for config in others}
        self._pool = ThreadPoolExecutor(max(1, len(others)), "reward")
        self._told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Panel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process. A closed panel judges no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes.values():
            process.kill(patience=2.0)

    def pids(self) -> dict[str, int]:
        """The processes that live now, by reward."""
        return {name: process.pid for name, process in self._processes.items() if process.pid is not None}

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        step: int = 0,
    ) -> Judgement:
        """Judge a batch with every reward at the same time.

        `columns` are the rows' other keys, as lists as long as the batch. Whatever a reward does wrong is in the
        Judgement; only a batch whose lists differ in length raises ConfigError.
        """
        count = len(completions)
        lists = {"prompts": prompts, "completion_ids": completion_ids, **(columns or {})}
        for name, values in lists.items():
            if len(values) != count:
                raise ConfigError(f"'{name}' has {len(values)} entries for {count} completions")
        ids = [list(map(int, each)) for each in completion_ids]
        rows = {name: list(values) for name, values in (columns or {}).items()}
        batch = wire.Batch(list(prompts), list(completions), ids, rows, step)
        with self._lock:
            return self._judge(batch)

    def _judge(self, batch: wire.Batch) -> Judgement:
        waiting: dict[str, Future[wire.Scored]] = {}
        if self._processes and len(batch):
            waiting = {name: self._pool.submit(_ask, process, batch) for name, process in self._processes.items()}
        parts: dict[str, list[float | None]] = {}
        answers: dict[str, wire.Scored] = {}
        for config in self._configs:
            if config.kind == "model" and len(batch):
                answers[config.name] = _call(self._models[config.model], batch)
        answers |= {name: future.result() for name, future in waiting.items()}
        notes: list[str] = []
        faults, metrics, extra = dict[str, Counter[str]](), dict[str, float](), dict[str, list[Any]]()
        for config in self._configs:
            name = config.name
            scored = answers.get(name) or wire.Scored([])
            parts[name] = scored.values
            faults[name] = Counter()
            for fault in scored.faults:
                faults[name][fault.reason] += fault.count
                notes += self._tell(name, fault)
            metrics |= {f"{name}.{metric}": value for metric, value in scored.metrics.items()}
            extra |= {f"{name}.{column}": values for column, values in scored.extra.items()}
        totals = [self._total(parts, i) for i in range(len(batch))]
        return Judgement(totals=totals, parts=parts, faults=faults, notes=notes, metrics=metrics, extra=extra)

    def _total(self, parts: Mapping[str, Sequence[float | None]], i: int) -> float | None:
        given = [(config.weight, parts[config.name][i]) for config in self._configs]
        known = [weight * value for weight, value in given if value is not None]
        return sum(known) if known else None

    def _tell(self, name: str, fault: wire.Fault) -> list[str]:
        """One line for a kind of fault that was not told before: the reason, and the class of what was raised."""
        kind = fault.note.split(":")[0] if fault.reason == "raised" else fault.reason
        if (name, kind) in self._told:
            return []
        self._told.add((name, kind))
        lost = f" ({fault.count} completions)" if fault.count else ""
        return [f"reward '{name}' {fault.note}{lost}".replace("\n", " ")]


def _ask(process: RewardProcess, batch: wire.Batch) -> wire.Scored:
    try:
        return process.ask(wire.encode(batch), len(batch))
    except wire.Broken as broken:
        return wire.Scored([None] * len(batch), [wire.Fault(broken.reason, len(batch), str(broken))])


def _call(model: RewardModel, batch: wire.Batch) -> wire.Scored:
    try:
        return wire.checked(model(batch.prompts, batch.completions, batch.completion_ids, batch.columns), len(batch))
    except Exception as error:  # a model on one bad batch costs that batch, as a function would
        return wire.Scored([None] * len(batch), [wire.Fault("raised", len(batch), "raised " + one_line(error))])
