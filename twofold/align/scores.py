"""An evaluation as figures: one plain record, the same for the terminal, the card, the training page and a file.

    evaluation.json in a model's or a run's directory
    {"evaluations": [{"task": "tests", "model": "pybot", "prompts": 40, "samples": 8, "greedy": {...},
                      "pass@k": {"1": {"value": 0.2, "low": 0.1, "high": 0.3}, ...}, "rewards": {...}, ...}, ...]}

A record has no date and no path, so that the same weights give the same bytes. Of two of one task the newer stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..core import ConfigError
from .estimates import LEVEL, Interval, bootstrap, pass_at_k, share, verdict, wilson
from .evaluate import Evaluation, Outcome, Scored
from .task import fingerprint

FILE = "evaluation.json"

_LABELS = {"greedy": "greedy", "pass@k": "pass@{}", "reward": "reward, {}", "rewards": "rewards.{}"}

Record = dict[str, Any]
Measure = Callable[[Outcome], float | None]
"""What one prompt adds to a mean; None where it has nothing to add."""


def record(found: Evaluation) -> Record:
    """The figures of an evaluation, each with the bounds of its interval."""
    task, outcomes = found.task, found.outcomes
    said = [scored for outcome in outcomes for scored in _all(outcome)]
    passed = sum(_passes(outcome.greedy, task.success) for outcome in outcomes)
    return {
        "task": task.name,
        "model": found.model,
        "prompts": len(outcomes),
        "samples": task.drawn,
        "greedy": {"passed": passed, **_plain(wilson(passed, len(outcomes)))},
        **{part: _means(outcomes, measures, task.seed) for part, measures in _measures(found).items()},
        "length": _length(said),
        "truncated": round(fmean(scored.rollout.finish == "length" for scored in said), 6),
        "unjudged": sum(scored.total is None for scored in said),
        "faults": dict(found.faults),
        "settings": {
            "chat": not isinstance(outcomes[0].prompt.shown, str),
            "max_tokens": task.max_tokens,
            "temperature": task.temperature,
            "top_p": task.top_p,
            "success": task.success,
            "seed": task.seed,
            "level": LEVEL,
            "data": fingerprint([outcome.prompt for outcome in outcomes]),
        },
    }


def compare(one: Evaluation, other: Evaluation) -> Record:
    """`one` against `other` on the same prompts: of each figure the mean difference a prompt, and what it shows.

    Paired, so that what is hard for both weighs nothing: far fewer prompts are needed than for two intervals apart.
    """
    pairs = list(zip(one.outcomes, other.outcomes, strict=True))
    greedy: Mapping[str, Measure] = {"greedy": lambda outcome: float(_passes(outcome.greedy, one.task.success))}
    figures: Record = {}
    for part, measures in ({"greedy": greedy} | _measures(one)).items():
        for name, measure in measures.items():
            both = [(measure(mine), measure(theirs)) for mine, theirs in pairs]
            differences = [mine - theirs for mine, theirs in both if mine is not None and theirs is not None]
            if differences:
                interval = bootstrap(differences, one.task.seed)
                label = _LABELS[part].format(name)
                figures[label] = {**_plain(interval), "verdict": verdict(interval, len(differences))}
    return {"model": one.model, "against": other.model, "prompts": len(pairs), "differences": figures}


def answers(found: Evaluation) -> Iterator[Record]:
    """A row for each prompt: what was shown, every answer, and what each was worth."""
    for outcome in found.outcomes:
        yield {
            "model": found.model,
            "prompt": outcome.prompt.shown,
            **({"columns": dict(outcome.prompt.columns)} if outcome.prompt.columns else {}),
            "greedy": _told(outcome.greedy),
            "samples": [_told(scored) for scored in outcome.samples],
        }


# ------------------------------------------------------------------------------------------------- the file
def keep(directory: Path, new: Record) -> Path:
    """Put a record into a directory's `evaluation.json`, in place of an older one of its task.

    Raises:
        ConfigError: there is such a file, and it is not one of ours; or it cannot be written.
    """
    path = directory / FILE
    kept = [old for old in kept_in(directory) if old.get("task") != new["task"]]
    text = json.dumps({"evaluations": sorted([*kept, new], key=lambda entry: str(entry["task"]))}, indent=1)
    fresh = path.with_suffix(".tmp")
    try:
        fresh.write_text(text + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return path


def kept_in(directory: Path) -> list[Record]:
    """The records of a directory, by their tasks' names."""
    path = directory / FILE
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        return [dict(entry) for entry in found if entry["task"]]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path} is not a record of evaluations: move it away") from None


# ------------------------------------------------------------------------------------------------- the figures
def _measures(found: Evaluation) -> dict[str, dict[str, Measure]]:
    """What is averaged over prompts, by part and name."""
    task = found.task
    names = sorted({name for outcome in found.outcomes for scored in _all(outcome) for name in scored.parts})
    parts: dict[str, dict[str, Measure]] = {"pass@k": {}, "reward": {"greedy": lambda o: o.greedy.total}}
    if task.drawn:
        parts["pass@k"] = {str(k): _at(k, task.success) for k in task.k}
        parts["reward"]["sampled"] = lambda outcome: _mean([scored.total for scored in outcome.samples])
    parts["rewards"] = {name: _part(name) for name in names}
    return parts


def _at(k: int, success: float) -> Measure:
    def measure(outcome: Outcome) -> float:
        passed = sum(_passes(scored, success) for scored in outcome.samples)
        return pass_at_k(len(outcome.samples), passed, k)

    return measure


def _part(name: str) -> Measure:
    """One reward alone: of the sampled answers, or of the greedy one where none were drawn."""
    return lambda outcome: _mean([scored.parts.get(name) for scored in outcome.samples or (outcome.greedy,)])


def _means(outcomes: Sequence[Outcome], measures: Mapping[str, Measure], seed: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, measure in measures.items():
        values = [value for value in map(measure, outcomes) if value is not None]
        if values:
            within = all(0.0 <= value <= 1.0 for value in values)
            found[name] = _plain(share(values, seed) if within else bootstrap(values, seed))
    return found


def _passes(scored: Scored, success: float) -> bool:
    """An answer that nobody could judge has not passed."""
    return scored.total is not None and scored.total >= success


def _mean(values: Sequence[float | None]) -> float | None:
    said = [value for value in values if value is not None]
    return fmean(said) if said else None


def _length(said: Sequence[Scored]) -> float | None:
    """Mean tokens of an answer; None where a server does not tell what its tokens were."""
    known = [len(scored.rollout.ids) for scored in said if scored.rollout.ids or not scored.rollout.text]
    return round(fmean(known), 2) if len(known) == len(said) else None


def _all(outcome: Outcome) -> tuple[Scored, ...]:
    return (outcome.greedy, *outcome.samples)


def _plain(interval: Interval) -> dict[str, float]:
    return {name: round(getattr(interval, name), 6) for name in ("value", "low", "high")}


def _told(scored: Scored) -> Record:
    ran = scored.rollout
    return {
        "text": ran.text,
        "reward": scored.total,
        "parts": dict(scored.parts),
        "finish": ran.finish,
        "tokens": len(ran.ids),
    }
