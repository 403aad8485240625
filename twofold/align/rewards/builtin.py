"""The built-in rewards that judge one completion at a time: regex, length, equals, json_schema, python_parses."""

from __future__ import annotations

import importlib.abc
import re
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from ...data.schema import valid
from .config import RewardConfig
from .extract import code_of, json_of, text_of
from .wire import Batch, Fault, Scored, checked

Row = Mapping[str, Any]  # prompt, completion, ids, and the row's columns
One = Callable[[Row], float | None]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LONGEST = 1_000_000  # characters of a program
_LEAST = 0.02  # seconds: a few ticks of the processor's clock


def one_by_one(config: RewardConfig) -> Callable[[Batch], Scored]:
    """A scorer that gives each completion `seconds` of its own; one that takes longer is worth 0.0, and is counted.

    They are seconds of the processor: in a large batch a share is short, and a machine that is busy with something else
    must not cost a completion its reward.
    """
    one = _KINDS[config.kind](config)

    def score(batch: Batch) -> Scored:
        end = time.monotonic() + 0.8 * config.timeout
        values: list[float | None] = []
        late = 0
        signal.signal(signal.SIGPROF, _ring)
        for i, completion in enumerate(batch.completions):
            row = {name: column[i] for name, column in batch.columns.items()}
            row |= {"#prompt": batch.prompts[i], "#completion": completion, "#ids": batch.completion_ids[i]}
            share = (end - time.monotonic()) / (len(batch) - i)
            value: float | None
            try:
                signal.setitimer(signal.ITIMER_PROF, max(_LEAST, min(config.seconds, share)))
                try:
                    value = one(row)
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            except _TooLong:
                value, late = 0.0, late + 1
            values.append(value)
        scored = checked(values, len(batch))
        if late:
            note = f"took more than {config.seconds:g} s for a completion, or its share of the batch's: worth 0.0"
            scored.faults.append(Fault("timeout", late, note))
        return scored

    return score


class _TooLong(BaseException):
    pass


def _ring(number: int, frame: FrameType | None) -> None:
    raise _TooLong


def _regex(config: RewardConfig) -> One:
    """1.0 where the pattern is found."""
    pattern = re.compile(config.pattern)
    find = pattern.fullmatch if config.whole else pattern.search
    return lambda row: 1.0 if find(text_of(row["#completion"])) else 0.0


def _length(config: RewardConfig) -> One:
    """1.0 between `least` and `most`, falling in a straight line to 0.0 over `slack`."""

    def score(row: Row) -> float:
        text = text_of(row["#completion"])
        count = {"tokens": len(row["#ids"]), "words": len(text.split()), "characters": len(text)}[config.unit]
        over = max(config.least - count, count - config.most if config.most else 0, 0)
        return max(0.0, 1.0 - over / config.slack) if config.slack else float(over == 0)

    return score


def _equals(config: RewardConfig) -> One:
    """1.0 where the completion's answer is the row's; None for a row that has none."""

    def score(row: Row) -> float | None:
        right = row.get(config.answer)
        if right is None:
            return None
        said: str | None = text_of(row["#completion"])
        if config.pattern:
            found = re.findall(f"(?:{config.pattern})", said or "", re.DOTALL)
            last = found[-1] if found else None
            said = last[0] if isinstance(last, tuple) else last
        return 0.0 if said is None else float(_SAME[config.compare](said, str(right)))

    return score


def _json_schema(config: RewardConfig) -> One:
    """1.0 where the completion is JSON, whole or in a fenced block, and what the schema says."""

    def score(row: Row) -> float:
        try:
            return float(valid(json_of(row["#completion"]), config.schema))
        except (ValueError, OverflowError, RecursionError):
            return 0.0

    return score


def _python_parses(config: RewardConfig) -> One:
    """1.0 where the code compiles; it is not run."""

    def score(row: Row) -> float:
        return float(compiles(code_of(row["#prompt"], row["#completion"], prefix=config.prefix)))

    return score


def compiles(code: str) -> bool:
    """Whether text is a Python module that says anything at all."""
    if not code.strip() or len(code) > _LONGEST:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.abc.InspectLoader.source_to_code(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
    return True


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _numeric(text: str) -> float | None:
    """The last number in a text: what stands at the end of a solution."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(said: str, right: str) -> bool:
    left, wanted = _numeric(said), _numeric(right)
    if left is None or wanted is None:
        return False
    return abs(left - wanted) <= 1e-6 * max(1.0, abs(wanted))


_SAME: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda said, right: said == right,
    "text": lambda said, right: _folded(said) == _folded(right),
    "number": _same_number,
}
_KINDS: dict[str, Callable[[RewardConfig], One]] = {
    "regex": _regex,
    "length": _length,
    "equals": _equals,
    "json_schema": _json_schema,
    "python_parses": _python_parses,
}
