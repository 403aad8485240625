"""How fast are rollouts, and whole steps of GRPO and PPO, against TRL with transformers' generation?

    make peers
    twofold bench rollout_peers [--quick] [--models small 50M] [--threads 4 1] [--only full ends ppo] [--json FILE]

A step is 16 prompts of 64 tokens, 8 answers to each of up to 128 new tokens, a reward that costs nothing, and one
optimizer step of AdamW; fp32, no recomputation, random weights (rollout_shapes.py). Ours is `twofold align`, theirs
TRL's own trainers, each in a process that is stopped when it is not its turn. In the first step TRL learns from our
answers: gradients and rewards must agree, so the work is the same. That step is not timed, and takes turns after it.

    full    GRPO, EOS ignored: all answers have 128 tokens on both sides
    ends    GRPO, one token in 64 ends an answer: a static batch waits for its longest
    ppo     PPO, EOS ignored: each prompt 8 times, a reference and a value model besides
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
import rollout_shapes as shapes
from rollout_figures import Side, apart, ratios, same_work, told
from rollout_shapes import QUICK, Work
from turns import PEERS, Runner, RunnerEnded, plain_environment

from twofold.platforms import usable_cores

HERE = Path(__file__).resolve().parent
OURS = "twofold"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is measured: our algorithm, and the peer's runner in `peers/` and its environment (of peers/build.py)."""

    algorithm: str
    runner: str
    home: str
    flags: tuple[str, ...] = ()


KINDS = {
    "full": Kind(algorithm="grpo", runner="align_trl.py", home="trl"),
    "ends": Kind(algorithm="grpo", runner="align_trl.py", home="trl", flags=("--ends",)),
    "ppo": Kind(algorithm="ppo", runner="align_trl_ppo.py", home="trl_ppo"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a tiny policy, 16 answers of 16 tokens, one turn")
    parser.add_argument("--models", nargs="+", choices=("small", "50M"), default=["small", "50M"])
    cores = usable_cores()
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({cores, 1})[::-1], help="default: all, and 1")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--turns", type=int, help="how often each side makes a step (default: 3; 1 with --quick)")
    parser.add_argument("--rows", type=int, default=16, help="answers to a pass of TRL's trainer (default: 16)")
    parser.add_argument("--micro", type=int, default=4096, help="tokens to a pass of ours (default: 4096)")
    parser.add_argument("--no-peers", action="store_true", help="measure ours alone")
    parser.add_argument("--cache", type=Path, default=shapes.PLACE, help=f"policies go here (default: {shapes.PLACE})")
    parser.add_argument("--place", type=Path, default=HERE.parent / ".peers", help="what make peers built")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    return parser.parse_args()


class Match:
    """Both sides of one policy at one kind of work, taking turns."""

    def __init__(self, name: str, kind: str, threads: int, args: argparse.Namespace) -> None:
        self.work = QUICK if args.quick else Work()
        self.kind, self.threads, self.args = KINDS[kind], threads, args
        self.model = shapes.make(name, args.cache, self.work).resolve()
        self.place = args.place.expanduser().resolve()
        self.sides: dict[str, Side] = {}
        self.absent: dict[str, str] = {}

    def play(self, turns: int) -> None:
        """The step that all learn alike, then steps in turn; a peer that fails is out of the match."""
        with tempfile.TemporaryDirectory() as folder:
            runners: dict[str, Runner] = {}
            try:
                for name in (OURS, *self._peers()):
                    runners[name] = self._start(name, Path(folder))
                self._begin(runners)
                for turn in range(turns):
                    for name in list(runners):
                        self._turn(name, runners, turn)
            finally:
                for runner in runners.values():
                    runner.close()

    def _peers(self) -> list[str]:
        if self.args.no_peers:
            return []
        if (self.place / self.kind.home / "bin" / "python").exists():
            return ["TRL"]
        self.absent["TRL"] = f"no environment {self.place / self.kind.home}: make peers"
        return []

    def _start(self, name: str, folder: Path) -> Runner:
        work, output = self.work, folder / name
        output.mkdir()
        flags = ["--model", str(self.model), "--prompts", shapes.prompts_file(work), "--threads", str(self.threads)]
        flags += ["--group", str(work.group), "--length", str(work.length), "--new", str(work.new)]
        flags += ["--output", str(output), *self.kind.flags]
        if name == OURS:
            package = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            flags += ["--algorithm", self.kind.algorithm, "--micro", str(self.args.micro)]
            command = [sys.executable, str(PEERS / "align_twofold.py")]
            return Runner([*command, *flags], plain_environment(self.threads, PYTHONPATH=package))
        command = [str(self.place / self.kind.home / "bin" / "python"), str(PEERS / self.kind.runner)]
        flags += ["--rows", str(min(self.args.rows, work.answers // 4))]
        return Runner([*command, *flags], plain_environment(self.threads))

    def _begin(self, runners: dict[str, Runner]) -> None:
        """All load side by side; our first step is everybody's. Then each has a step of its own, to warm up."""
        given: Any = None
        for name in list(runners):
            try:
                about = runners[name].ready()
                answer = self._ask(runners[name], given)
                self.sides[name] = Side(about=about, first=answer["told"][0])
                self._ask(runners[name], None)
                given = answer["rollouts"]
            except RunnerEnded as reason:
                self._out(name, runners, reason)

    def _turn(self, name: str, runners: dict[str, Runner], turn: int) -> None:
        try:
            answer = self._ask(runners[name], None)
        except RunnerEnded as reason:
            self._out(name, runners, reason)
            return
        self.sides[name].add(answer)
        rate, seconds = self.sides[name].rates[-1], answer["seconds"][0]
        print(f"    turn {turn + 1}: {name}: {rate:,.0f} rollout tokens/s, step {seconds:.2f} s", flush=True)

    def _ask(self, runner: Runner, given: Any) -> dict[str, Any]:
        """One step, whose answers are checked. Raises RunnerEnded when they are not as they were asked for."""
        runner.send({"steps": 1, "given": given})
        answer = runner.answer()
        prompts = {tuple(prompt) for prompt, _ in answer["rollouts"]}
        lengths = [len(ids) for _, answers in answer["rollouts"] for ids in answers]
        if any(len(prompt) != self.work.length for prompt in prompts) or len(lengths) != self.work.answers:
            raise RunnerEnded(f"it answered {len(prompts)} prompts {len(lengths)} times")
        least = 1 if "--ends" in self.kind.flags else self.work.new
        if min(lengths) < least or max(lengths) > self.work.new:
            raise RunnerEnded(f"its answers have {min(lengths)} to {max(lengths)} tokens")
        if given and sorted(given) != sorted(answer["rollouts"]):
            raise RunnerEnded("it did not learn from the answers that it was given")
        return answer

    def _out(self, name: str, runners: dict[str, Runner], reason: RunnerEnded) -> None:
        runners.pop(name).close()
        self.sides.pop(name, None)
        self.absent[name] = str(reason)
        print(f"    {name}: out: {reason}", flush=True)
        if name == OURS:
            raise reason


def cell(name: str, kind: str, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """One policy, one kind of work, from start to table."""
    match, began = Match(name, kind, threads, args), time.monotonic()
    print(f"{name}, {kind}, {threads} threads: {match.work.told()}", flush=True)
    match.play(args.turns or (1 if args.quick else 3))
    print("\n".join(told(match.sides, match.work.answers)))
    for absent, why in match.absent.items():
        print(f"  {absent}: not measured: {why}")
    print(f"  ({time.monotonic() - began:.0f} s)\n", flush=True)
    return {"model": name, "kind": kind, "threads": threads, "not_here": match.absent} | record(match)


def record(match: Match) -> dict[str, Any]:
    """A match for the file."""
    (_, ours), *peers = match.sides.items()
    against: dict[str, dict[str, Any]] = {}
    for name, theirs in peers:
        against[name] = {key: vars(spread) for key, spread in ratios(ours, theirs).items()}
        against[name] |= {"apart": apart(ours, theirs), "work": same_work(ours, theirs, match.work.answers)}
    return {"sides": {name: side.record() for name, side in match.sides.items()}, "ours_over": against}


def main() -> int:
    args = arguments()
    models = ["quick"] if args.quick else args.models
    counts = args.threads[:1] if args.quick else args.threads
    machine = [limits.measure(threads, quick=True) for threads in counts]
    for found in machine:
        print(limits.line(found), flush=True)
    cells = [cell(name, kind, threads, args) for threads in counts for name in models for kind in args.only]
    if args.json:
        args.json.write_text(json.dumps({"limits": machine, "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
