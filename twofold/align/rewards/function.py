"""A Python function as a reward: found by its path, called in the shape its author wrote it for.

    trl        f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list
    verl       compute_score(data_source, solution_str, ground_truth, extra_info) -> number or {"score": ...}
    openrlhf   reward_func(queries, prompts, labels, **options) -> list or {"rewards": ..., "extra_logs": {...}}

Each may be a coroutine function. Only what the function's signature takes is handed over.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ...core import ConfigError, unknown
from .config import RewardConfig
from .extract import text_of
from .wire import Batch, Fault, Scored, checked

Function = Callable[..., Any]


def load_function(path: str) -> Function:
    """What "file.py:name" or "package.module:name" names. Raises ConfigError, or what the import of it raises."""
    place, _, name = path.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found: Any = getattr(module, name, None)
    if not callable(found):
        functions = [known for known, thing in vars(module).items() if inspect.isfunction(thing)]
        raise ConfigError(f"{place}: " + unknown("function", name, functions))
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours can be imported, as for a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class FunctionScorer:
    """One function, and the event loop that its coroutines share from call to call."""

    def __init__(self, config: RewardConfig) -> None:
        self._function = load_function(config.path)
        self._config = config
        self._loop = asyncio.Runner()
        self._shape = {"trl": self._trl, "verl": self._verl, "openrlhf": self._openrlhf}[config.interface]

    def __call__(self, batch: Batch) -> Scored:
        return self._shape(batch)

    def _call(self, options: dict[str, Any]) -> Any:
        parameters = inspect.signature(self._function).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            names = {p.name for p in parameters}
            options = {name: value for name, value in options.items() if name in names}
        result = self._function(**options)
        return self._loop.run(_awaited(result)) if inspect.isawaitable(result) else result

    def _trl(self, batch: Batch) -> Scored:
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, float] = {}
        options = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
            "trainer_state": SimpleNamespace(global_step=batch.step),
            "log_extra": lambda column, values: extra.__setitem__(str(column), [_plain(v) for v in values]),
            "log_metric": lambda name, value: metrics.__setitem__(str(name), float(value)),
        }
        scored = checked(self._call(options), len(batch))
        scored.metrics, scored.extra = metrics, extra
        return scored

    def _verl(self, batch: Batch) -> Scored:
        """One call for each completion: a call that raises costs only its own value."""
        given: list[Any] = []
        raised: list[Fault] = []
        said: dict[str, list[float]] = {}
        for i in range(len(batch)):
            row = {name: column[i] for name, column in batch.columns.items()}
            truth = row.get("ground_truth", (row.get("reward_model") or {}).get("ground_truth"))
            try:
                result = self._call(
                    {
                        "data_source": row.get("data_source"),
                        "solution_str": text_of(batch.completions[i]),
                        "ground_truth": truth,
                        "extra_info": row.get("extra_info"),
                    }
                )
            except Exception as error:
                raised.append(Fault("raised", 1, "raised " + one_line(error)))
                result = None
            if isinstance(result, dict):
                for name, value in result.items():
                    if name != "score" and isinstance(value, int | float):
                        said.setdefault(name, []).append(float(value))
                result = result.get("score", "a table without 'score'")
            given.append(result)
        scored = checked(given, len(batch))
        scored.faults += raised
        scored.metrics = {name: sum(values) / len(values) for name, values in said.items()}
        return scored

    def _openrlhf(self, batch: Batch) -> Scored:
        prompts = [text_of(prompt) for prompt in batch.prompts]
        queries = [prompt + text_of(completion) for prompt, completion in zip(prompts, batch.completions)]
        labels = labels_of(batch, self._config.answer)
        result = self._call({**batch.columns, "queries": queries, "prompts": prompts, "labels": labels})
        return openrlhf_answer(result, len(batch))


def openrlhf_answer(result: Any, count: int) -> Scored:
    """{"rewards": [...], "extra_logs": {name: numbers}} or a bare list; the logs become means."""
    if not isinstance(result, dict):
        return checked(result, count)
    scored = checked(result.get("rewards"), count)
    logs = result.get("extra_logs")
    for name, values in (logs if isinstance(logs, dict) else {}).items():
        numbers = [n for n in _numbers(values) if isinstance(n, int | float)]
        if numbers:
            scored.metrics[str(name)] = sum(numbers) / len(numbers)
    return scored


def labels_of(batch: Batch, column: str) -> list[Any]:
    """The column of right answers under the name it has here, or None for each."""
    for name in ("label", "labels", column):
        if name in batch.columns:
            return batch.columns[name]
    return [None] * len(batch)


def one_line(error: BaseException) -> str:
    """An exception as one line: what, and where in the function's own file."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f" ({Path(code.co_filename).name}:{trace.tb_lineno})" if code.co_filename != __file__ else where
        trace = trace.tb_next
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def _numbers(values: Any) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, list | tuple) else [values]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


async def _awaited(result: Any) -> Any:
    return await result
