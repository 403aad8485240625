"""Evaluation: a rollout with no update. Whoever answers prompts is asked, a panel judges, and nothing is learned.

    prompts ── answer(greedy) ── 1 each ─┐
            └─ answer(sampled) ─ n each ─┴── panel.score ── Evaluation ── scores.py: figures and intervals

An `Answerer` may be an engine in this process, a server, or the engine of a run in training: it is a function from
prompts and a way to draw to groups of rollouts, in any order, as they end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from ..core import WorkerError
from .episode import Group, Prompt, Rollout
from .task import Task

AT_ONCE = 256
"""Answers that a panel is given together."""

Tell = Callable[[str, int, int], None]
"""(what is going on, how many are done, how many there are)"""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers are drawn: `n` to a prompt. Temperature 0 is greedy."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int

    def seed_of(self, prompt: Prompt, part: int = 0) -> int:
        """The seed of a prompt's samples, in [0, 2^63), the same whoever answers; `part` counts separate requests."""
        digest = blake2b(f"{self.seed}/{prompt.number}/{part}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


Answerer = Callable[[Sequence[Prompt], Drawing], Iterator[Group]]


class Judged(Protocol):
    """What a panel says: a total for each answer and its parts by the rewards' names; None where it has no answer."""

    @property
    def totals(self) -> Sequence[float | None]: ...
    @property
    def parts(self) -> Mapping[str, Sequence[float | None]]: ...
    @property
    def faults(self) -> Mapping[str, int]: ...


class Judge(Protocol):
    """A panel of rewards, as `align/rewards` makes one."""

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        step: int,
    ) -> Judged: ...


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer and what it is worth: None where no reward could say."""

    rollout: Rollout
    total: float | None
    parts: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A prompt, its greedy answer, and its sampled ones."""

    prompt: Prompt
    greedy: Scored
    samples: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that was answered and judged; `faults` are how often each reward failed to judge."""

    task: Task
    model: str
    outcomes: tuple[Outcome, ...]
    faults: Mapping[str, int]


def evaluate(
    task: Task, prompts: Sequence[Prompt], answer: Answerer, panel: Judge, *, model: str = "", tell: Tell | None = None
) -> Evaluation:
    """Ask everything once greedily and `task.drawn` times sampled, and judge it.

    `model` is what the figures are told of. Raises WorkerError when an answer is missing at the end.
    """
    say = tell or (lambda what, done, total: None)
    greedy = Drawing(n=1, temperature=0.0, top_p=1.0, max_tokens=task.max_tokens, stop=task.stop, seed=task.seed)
    sampled = Drawing(
        n=task.drawn,
        temperature=task.temperature,
        top_p=task.top_p,
        max_tokens=task.max_tokens,
        stop=task.stop,
        seed=task.seed,
    )
    firsts = _ask(prompts, greedy, answer, lambda done: say("greedy answers", done, len(prompts)))
    others: dict[int, tuple[Rollout, ...]] = {}
    if sampled.n:
        total = len(prompts) * sampled.n
        others = _ask(prompts, sampled, answer, lambda done: say("sampled answers", done, total))
    groups = [(*firsts[prompt.number], *others.get(prompt.number, ())) for prompt in prompts]
    scored, faults = _judge(prompts, groups, panel, say)
    outcomes = tuple(Outcome(prompt, found[0], tuple(found[1:])) for prompt, found in zip(prompts, scored, strict=True))
    return Evaluation(task, model, outcomes, faults)


def _ask(
    prompts: Sequence[Prompt], drawing: Drawing, answer: Answerer, tell: Callable[[int], None]
) -> dict[int, tuple[Rollout, ...]]:
    """All groups, by their prompts' numbers."""
    found: dict[int, tuple[Rollout, ...]] = {}
    tell(0)
    for group in answer(prompts, drawing):
        found[group.prompt.number] = group.rollouts
        tell(drawing.n * len(found))
    missing = [prompt.number for prompt in prompts if len(found.get(prompt.number, ())) != drawing.n]
    if missing:
        raise WorkerError(f"prompt {missing[0]} and {len(missing) - 1} others were not answered {drawing.n} times each")
    return found


def _judge(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], panel: Judge, say: Tell
) -> tuple[list[list[Scored]], dict[str, int]]:
    """Every answer with its worth, grouped as they came, and the rewards' faults."""
    flat = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    keys = sorted({key for prompt in prompts for key in prompt.columns})
    scored: list[Scored] = []
    faults: Counter[str] = Counter()
    for start in range(0, len(flat), AT_ONCE):
        batch = flat[start : start + AT_ONCE]
        say("judging", start, len(flat))
        said = panel.score(
            [prompt.shown for prompt, _ in batch],
            [rollout.text for _, rollout in batch],
            [list(rollout.ids) for _, rollout in batch],
            {key: [prompt.columns.get(key) for prompt, _ in batch] for key in keys},
            0,
        )
        faults.update(said.faults)
        for place, (_, rollout) in enumerate(batch):
            parts = {name: values[place] for name, values in said.parts.items()}
            scored.append(Scored(rollout, said.totals[place], parts))
    say("judging", len(flat), len(flat))
    left = iter(scored)
    return [list(itertools.islice(left, len(group))) for group in groups], dict(faults)
