"""How fast does training go and how much memory does it take, against the others, on 1, 2 and 4 ranks?

    make peers
    twofold bench train_peers [--quick] [--models 50M 300M] [--ranks 1 2 4] [--peers ...] [--turns N] [--json FILE]

Decoders of 50 and 300 million weights (train_shapes.py), two sequences of 512 a rank and step, fp32, the same first
weights, token ids and AdamW for all; cores are divided among the ranks. Engines take turns, A B A B, each rank a
process of its own that is stopped when it is not its turn. Where they do not fit into memory beside each other, each is
ended after its turn, and starts from the first weights and warms up again at the next. Seconds are the slowest rank's,
memory is VmHWM from when the model was loaded. Losses must agree: the work was the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import train_shapes as shapes
from train_engines import PEER_ENGINES, Engine, Group, chosen
from train_figures import Outcome, record, told
from train_shapes import SHAPES, Shape
from turns import RunnerEnded

from twofold.platforms import read_memory, usable_cores

HERE = Path(__file__).resolve().parent
SLOW = 4.0
STEPS = {"50M": 3, "300M": 1, "quick": 3}
"""Steps of a turn."""
WARM = 2
"""Steps after every start that are not timed: DDP divides its buckets anew after the first."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a small decoder, 2 ranks, one turn")
    parser.add_argument("--models", nargs="+", choices=("50M", "300M"), default=["50M", "300M"])
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1 2 4; 2 with --quick")
    names = [engine.name for engine in PEER_ENGINES]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="default: all that are built")
    parser.add_argument("--turns", type=int, help="how often each engine runs (default: 3; 1 with --quick)")
    parser.add_argument("--steps", type=int, help="of a turn (default: 3 of the 50M decoder, 1 of the 300M)")
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="of all ranks together (default: all cores)"
    )
    parser.add_argument("--cache", type=Path, default=shapes.PLACE, help=f"decoders go here (default: {shapes.PLACE})")
    parser.add_argument("--place", type=Path, default=HERE.parent / ".peers", help="what make peers built")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    return parser.parse_args()


class Match:
    """The engines of one decoder on so many ranks, taking turns."""

    def __init__(self, shape: Shape, ranks: int, args: argparse.Namespace) -> None:
        self.shape, self.ranks = shape, ranks
        self.steps = args.steps or STEPS[shape.name]
        self.threads = max(1, args.threads // ranks)
        self.place = args.place.expanduser().resolve()
        self.model = shapes.make(shape, args.cache)
        self.groups: dict[str, Group] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.absent: dict[str, str] = {}
        self.engines = [engine for engine in chosen(ranks, args.peers) if self._can(engine)]
        together = sum(shape.needs(engine.stage, ranks) for engine in self.engines)
        self.stay = together < 0.8 * read_memory().available

    def _can(self, engine: Engine) -> bool:
        """Whether an engine can be started here at all; notes why not."""
        need, free = self.shape.needs(engine.stage, self.ranks), read_memory().available
        if engine.home and not (self.place / engine.home / "bin" / "python").exists():
            self.absent[engine.name] = f"no environment {self.place / engine.home}: make peers"
        elif need > 0.95 * free:
            self.absent[engine.name] = f"it may take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        return engine.name not in self.absent

    def play(self, turns: int) -> None:
        """All turns; a group that fails is out of the match, and a slow peer has one turn."""
        slow: set[str] = set()
        try:
            if self.stay:
                for engine in self.engines:  # they load side by side
                    self._begin(engine)
            for turn in range(turns):
                ours = 0.0
                for engine in self.engines:
                    if engine.name in slow or engine.name in self.absent:
                        continue
                    rate = self.turn(engine, turn)
                    ours = max(ours, rate) if engine.ours else ours
                    if not engine.ours and 0 < rate < ours / SLOW:
                        slow.add(engine.name)
        finally:
            for group in self.groups.values():
                group.close()

    def turn(self, engine: Engine, turn: int) -> float:
        """One turn of one engine: its tokens a second, 0 when it fell over."""
        try:
            group, found = self._group(engine), self.outcomes[engine.name]
            done = group.turn(self.steps)
        except RunnerEnded as reason:
            self.absent[engine.name] = str(reason)
            self.outcomes.pop(engine.name, None)
            self._end(engine.name)
            print(f"    {engine.name}: out: {reason}", flush=True)
            return 0.0
        rate = self.ranks * self.shape.tokens * self.steps / done.seconds
        found.rates[turn] = rate
        found.losses |= done.losses
        found.peak_mib = max(found.peak_mib, done.peak_mib)
        print(f"    turn {turn + 1}: {engine.name}: {rate:,.0f} tokens/s, {done.peak_mib:,.0f} MiB a rank", flush=True)
        if not self.stay:
            self._end(engine.name)
        return rate

    def _begin(self, engine: Engine) -> Group:
        """Start an engine's ranks."""
        group = Group(engine, self.model, self.shape, self.ranks, self.threads, self.place)
        self.groups[engine.name] = group
        return group

    def _group(self, engine: Engine) -> Group:
        """An engine's ranks, loaded and warm."""
        group = self.groups.get(engine.name) or self._begin(engine)
        if not group.warm:
            about = group.ready()
            found = self.outcomes.setdefault(engine.name, Outcome(ours=engine.ours, about=about))
            found.losses |= group.turn(WARM).losses
        return group

    def _end(self, name: str) -> None:
        if group := self.groups.pop(name, None):
            group.close()


def cell(shape: Shape, ranks: int, turns: int, args: argparse.Namespace) -> dict[str, Any]:
    """One decoder on so many ranks, from start to table."""
    match, began = Match(shape, ranks, args), time.monotonic()
    print(
        f"{shape.name}: {shape.parameters / 1e6:.1f}M weights, {shape.layers} layers of {shape.hidden} and "
        f"{shape.width}, vocabulary {shape.vocab:,}; {ranks} ranks of {shape.micro} x {shape.length} tokens, "
        f"{match.threads} threads each; {'all loaded at once' if match.stay else 'each started anew at its turn'}",
        flush=True,
    )
    match.play(turns)
    lines = told(match.outcomes) if match.outcomes else []
    lines += [f"  {name:<13} not measured: {why}" for name, why in match.absent.items()]
    print("\n".join(lines) + f"\n  ({time.monotonic() - began:.0f} s)\n", flush=True)
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "ranks": ranks,
        "threads": match.threads,
        "engines": record(match.outcomes),
        "not_here": match.absent,
    }


def main() -> int:
    args = arguments()
    names = ["quick"] if args.quick else args.models
    turns = args.turns or (1 if args.quick else 3)
    counts = args.ranks or ([2] if args.quick else [1, 2, 4])
    cells = [cell(SHAPES[name], ranks, turns, args) for name in names for ranks in counts]
    if args.json:
        args.json.write_text(json.dumps({"cores": usable_cores(), "turns": turns, "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
