"""Evaluation: a rollout with no update. Whoever answers prompts is asked, a panel judges, and nothing is learned.

    prompts ── answer(greedy) ── 1 each ─┐
            └─ answer(sampled) ─ n each ─┴── panel.score ── Evaluation ── scores.py: figures and intervals

An `Answerer` may be an engine in this process, a server, or the engine of a run in training: it is a function from
prompts and a way to draw to groups of rollouts, in any order, as they end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core import WorkerError
from .episode import Group, Prompt, Rollout
from .experience import judged
from .rewards import Judgement, Panel
from .task import Task

AT_ONCE = 16
"""Prompts whose answers a panel is given together."""

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


Answerer = Callable[[Sequence[Prompt], Drawing], Iterator[Group]]


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
    notes: tuple[str, ...] = ()
    """A line for each kind of fault."""


def evaluate(
    task: Task, prompts: Sequence[Prompt], answer: Answerer, panel: Panel, *, model: str = "", tell: Tell | None = None
) -> Evaluation:
    """Ask everything once greedily and `task.drawn` times sampled, and judge it.

    `model` is what the figures are told of. Raises WorkerError when an answer is missing at the end.
    """
    say = tell or (lambda what, done, total: None)
    sampled = Drawing(
        n=task.drawn,
        temperature=task.temperature,
        top_p=task.top_p,
        max_tokens=task.max_tokens,
        stop=task.stop,
        seed=task.seed,
    )
    greedy = replace(sampled, n=1, temperature=0.0, top_p=1.0)
    firsts = _ask(prompts, greedy, answer, lambda done: say("greedy answers", done, len(prompts)))
    others: dict[int, tuple[Rollout, ...]] = {}
    if sampled.n:
        total = len(prompts) * sampled.n
        others = _ask(prompts, sampled, answer, lambda done: say("sampled answers", done, total))
    groups = [
        Group(prompt=prompt, rollouts=(*firsts[prompt.number], *others.get(prompt.number, ()))) for prompt in prompts
    ]
    scored, faults, notes = _judge(groups, panel, say)
    outcomes = tuple(Outcome(prompt, found[0], tuple(found[1:])) for prompt, found in zip(prompts, scored))
    return Evaluation(task, model, outcomes, faults, tuple(notes))


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


def _judge(groups: Sequence[Group], panel: Panel, say: Tell) -> tuple[list[list[Scored]], Counter[str], list[str]]:
    """Every answer with its worth, grouped as they came, the rewards' faults, and a line for each kind of fault."""
    scored: list[list[Scored]] = []
    faults: Counter[str] = Counter()
    notes: list[str] = []
    for start in range(0, len(groups), AT_ONCE):
        some = groups[start : start + AT_ONCE]
        say("judging", start, len(groups))
        said = judged(some, panel, 0)
        faults.update(said.fault_counts)
        notes += said.notes
        rows = iter(range(len(said.totals)))
        for group in some:
            scored.append([_scored(said, next(rows), rollout) for rollout in group.rollouts])
    say("judging", len(groups), len(groups))
    return scored, faults, notes


def _scored(said: Judgement, row: int, rollout: Rollout) -> Scored:
    return Scored(rollout, said.totals[row], {name: values[row] for name, values in said.parts.items()})
