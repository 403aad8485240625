"""Experience: prompts to judged rollouts, each rank its share, and all of it on every rank.

    prompts of the step ── this rank's ──▶ rollout(engine) ──▶ rewards ──┐
    [0 1 2 3 4 5]           [1 3 5]         groups, streaming            ▼
                                                       everyone tells everyone: groups in the prompts' order
                                                                         │
                        pack: sequences end to end, and beside each target what was known when it was drawn

A token's seed hangs on (run's seed, step, prompt, sample) alone, so that any number of ranks draws the same.
Shapes: T tokens of the step's batch, N rollouts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from ..parallel import Mesh
from ..parallel.messages import everyone
from ..train.lesson import GivenUp
from ..train.loss import IGNORE
from .episode import Group, Prompt, Rollout
from .rewards import Judgement, Panel


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """A step's rollouts, in the order of their prompts and samples, and what they were judged to be worth."""

    rollouts: tuple[Rollout, ...]
    group_N: Tensor
    """The number of each one's prompt in the step, int64."""
    rewards_N: Tensor
    """Weighted totals, fp32; NaN where nobody gave one."""
    parts: Mapping[str, list[float | None]] = field(default_factory=dict)
    """What each reward function gave, unweighted."""
    faults: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Where the time went: rollout, reward; of the slowest rank."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What the engines did: preemptions, prompt tokens, and those of them that were found in the cache."""

    @property
    def lengths_N(self) -> Tensor:
        """Tokens of each that are the model's own."""
        return torch.tensor([sum(it.mine) for it in self.rollouts], dtype=torch.int64)

    @property
    def truncated_N(self) -> Tensor:
        return torch.tensor([it.finish == "length" for it in self.rollouts], dtype=torch.bool)

    @property
    def entropy(self) -> float:
        """The policy's entropy in nats a token, estimated from what was drawn: the mean of -log p."""
        own = [-p for it in self.rollouts for p, mine in zip(it.logprobs, it.mine, strict=True) if mine]
        return sum(own) / len(own) if own else math.nan

    def figures(self) -> dict[str, float]:
        """What the journal keeps of it."""
        counted = self.rewards_N[~self.rewards_N.isnan()]
        found = {
            "reward": _mean(counted),
            "reward_std": float(counted.std()) if len(counted) > 1 else 0.0,
            "length": _mean(self.lengths_N),
            "truncated": _mean(self.truncated_N),
            "skipped_rollouts": float(len(self.rewards_N) - len(counted)),
            "entropy": self.entropy,
        }
        for name, values in self.parts.items():
            given = [value for value in values if value is not None]
            found[f"rewards.{name}"] = sum(given) / len(given) if given else math.nan
        found |= {f"faults.{name}": float(count) for name, count in self.faults.items()}
        found |= {f"seconds_{name}": round(value, 3) for name, value in self.seconds.items()}
        found |= self.counts
        tokens = float(self.lengths_N.sum())
        return found | {"rollout_tokens_per_second": round(tokens / max(self.seconds.get("rollout", 0.0), 1e-9), 1)}


def placed(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A step's prompts with their places as numbers: one prompt may come twice, and is answered anew."""
    return [replace(prompt, number=place) for place, prompt in enumerate(prompts)]


def shared(prompts: Sequence[Prompt], mesh: Mesh) -> list[Prompt]:
    """This rank's prompts of a step: every n-th, so that ranks have long and short ones alike."""
    return list(prompts[mesh.rank("data") :: mesh.size("data")])


def seed_of(seed: int, step: int) -> int:
    """The seed of a step's rollouts, 63 bits."""
    return int.from_bytes(blake2b(f"rollout/{seed}/{step}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, kw_only=True)
class Valued:
    """A group, what each of its rollouts is worth in all, and what each reward function gave."""

    group: Group
    totals: list[float | None]
    parts: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank rolled out of a step: plain values, so that it can cross processes and wait in a checkpoint."""

    groups: list[Valued]
    faults: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    given_up: bool = False
    """It is not whole: the rank was asked to stop."""


def judged(groups: Sequence[Group], panel: Panel, step: int) -> Judgement:
    """What a panel says of every rollout of some groups, in order."""
    rollouts = [it for group in groups for it in group.rollouts]
    names = sorted({name for group in groups for name in group.prompt.columns})
    return panel.score(
        [it.prompt.shown for it in rollouts],
        [answer(it) for it in rollouts],
        [list(it.ids) for it in rollouts],
        {name: [it.prompt.columns.get(name) for it in rollouts] for name in names},
        step=step,
    )


def valued(groups: Sequence[Group], panel: Panel, step: int, watch: Watch, counts: Mapping[str, float]) -> Share:
    """Groups with what a panel says of every rollout."""
    told = judged(groups, panel, step)
    watch.lap("reward")
    found, at = [], 0
    for group in groups:
        its = slice(at, at + len(group.rollouts))
        parts = {name: values[its] for name, values in told.parts.items()}
        found.append(Valued(group=group, totals=told.totals[its], parts=parts))
        at = its.stop
    return Share(
        groups=found,
        faults=told.fault_counts,
        notes=list(told.notes),
        seconds=dict(watch.seconds),
        counts=dict(counts),
    )


def answer(rollout: Rollout) -> str | list[dict[str, Any]]:
    """A completion as reward functions are given it: a message where the prompt is messages, else a text."""
    if isinstance(rollout.prompt.shown, str):
        return rollout.text
    return [{"role": "assistant", "content": rollout.text}]


def gather(share: Share, prompts: Sequence[Prompt], mesh: Mesh) -> Harvest:
    """Everyone's share of a step on every rank, in the order of the prompts, whose numbers are their places."""
    mine = {
        "groups": [
            [it.group.prompt.number, [_plain(one) for one in it.group.rollouts], it.totals, it.parts]
            for it in share.groups
        ],
        **{name: getattr(share, name) for name in ("faults", "notes", "seconds", "counts", "given_up")},
    }
    found = everyone(mine, mesh.group("data"))
    if any(one["given_up"] for one in found):
        raise GivenUp
    by_number = {number: rest for one in found for number, *rest in one["groups"]}
    parts: dict[str, list[float | None]] = {name: [] for _, _, given in by_number.values() for name in given}
    rollouts, group, totals = list[Rollout](), list[int](), list[float]()
    for place, prompt in enumerate(prompts):
        plain, worth, given = by_number[prompt.number]
        rollouts += [_rollout(prompt, it) for it in plain]
        group += [place] * len(plain)
        totals += [math.nan if total is None else total for total in worth]
        for name, values in parts.items():
            values += given.get(name, [None] * len(plain))
    return Harvest(
        rollouts=tuple(rollouts),
        group_N=torch.tensor(group, dtype=torch.int64),
        rewards_N=torch.tensor(totals, dtype=torch.float32),
        parts=parts,
        faults={name: sum(one["faults"].get(name, 0) for one in found) for one in found for name in one["faults"]},
        notes=tuple(note for one in found for note in one["notes"]),
        seconds={name: max(one["seconds"].get(name, 0.0) for one in found) for name in share.seconds},
        counts={name: sum(one["counts"].get(name, 0.0) for one in found) for name in share.counts},
    )


def pack(rollouts: Sequence[Rollout], beside_N: Mapping[str, Tensor] | None = None) -> Batch:
    """Rollouts end to end: each loses its last id, and learns the model's own tokens alone.

    Beside each target stand `old`, its log-probability when it was drawn, and the values of `beside_N` [N] of its
    rollout.
    """
    ids, targets, old, lengths = list[int](), list[int](), list[float](), list[int]()
    for it in rollouts:
        whole = [*it.prompt.ids, *it.ids]
        before = len(it.prompt.ids) - 1
        ids += whole[:-1]
        targets += [IGNORE] * before + [token if own else IGNORE for token, own in zip(it.ids, it.mine, strict=True)]
        old += [0.0] * before + list(it.logprobs)
        lengths.append(len(whole) - 1)
    repeats = torch.tensor(lengths)
    beside = {name: torch.repeat_interleave(value_N, repeats) for name, value_N in (beside_N or {}).items()}
    return Batch(
        ids_T=torch.tensor(ids),
        targets_T=torch.tensor(targets),
        lengths=tuple(lengths),
        beside={"old": torch.tensor(old, dtype=torch.float32)} | beside,
    )


def _plain(it: Rollout) -> dict[str, Any]:
    names = ("sample", "ids", "logprobs", "mine", "versions", "finish", "text", "error")
    return {name: getattr(it, name) for name in names}


def _rollout(prompt: Prompt, plain: Mapping[str, Any]) -> Rollout:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return Rollout(prompt=prompt, **fields)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


class Watch:
    """Seconds by name, as phases of a step go by."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last one belongs to `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._began
        self._began = now
