"""How fast is serving, against the other engines of CPUs, at fp32, bf16, int8 and int4?

    make peers
    twofold bench serving [--quick] [--formats int8 ...] [--only ABC] [--peers ...] [--json FILE] [--svg FILE]

Workloads A to E (workload.py) on a model with random weights (model.py), greedy, the same token ids for all. Engines
take turns, A B A B, each in a process of its own that is stopped when it is not its turn; medians, and the spread of
the ratios. A peer whose first turn takes more than four times ours is measured once. Beside it stand the machine's own
limits, measured in the same run, and our share of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import limits
import model as models
from chart import chart
from engines import FORMATS, OURS, PEER_ENTRIES, Entry, NotHere, Stand
from figures import CELLS, Against, Results, agreement, best_of, shares, table, told
from turns import Runner, RunnerEnded
from workload import NAMES, Sizes, Workload, workload

from twofold.models import read_spec
from twofold.platforms import read_memory, usable_cores

HERE = Path(__file__).resolve().parent
SLOW = 4.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the small model, a quarter of the work, one turn")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="default: all; fp32 with --quick")
    parser.add_argument("--only", default="".join(NAMES), help="which workloads, e.g. ABD (default: ABCDE)")
    names = [entry.name for entry in PEER_ENTRIES]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="default: all that are built")
    parser.add_argument("--turns", type=int, help="how often each engine runs (default: 3; 1 with --quick)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every engine (default: all cores)")
    parser.add_argument("--models", type=Path, default=models.PLACE, help=f"default: {models.PLACE}")
    parser.add_argument("--place", type=Path, default=HERE.parent / ".peers", help="what make peers built")
    parser.add_argument("--cache-gb", type=int, help="KV cache of each engine (default: 4; 1 with --quick)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="fields of our EngineConfig")
    parser.add_argument("--prepare", action="store_true", help="write what the peers read, and measure nothing")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--svg", type=Path, help="draw the table of ratios into this file")
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(NAMES)):
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return args


def groups(entries: Sequence[Entry], weights: int, form: str, cache_gb: int) -> Iterator[list[Entry]]:
    """Peers that fit into memory beside each other and ours: each its weights, its cache and a gigabyte."""
    each = weights * {"fp32": 4, "bf16": 4, "int8": 2, "int4": 2}[form] + (cache_gb + 1 << 30)
    room = max(1, int(0.8 * read_memory().available / each) - 1)
    for start in range(0, len(entries), room):
        yield list(entries[start : start + room])


def is_there(stand: Stand, entry: Entry, form: str, results: Results) -> bool:
    """Whether an engine can be started at a precision, its checkpoint converted; notes why not."""
    try:
        stand.prepare(entry, form)
    except NotHere as reason:
        results.absent[entry.name] = str(reason)
        print(f"  {entry.name}: not here: {reason}", flush=True)
        return False
    return True


def start_all(stand: Stand, entries: Sequence[Entry], form: str, results: Results) -> dict[str, Runner]:
    """The engines, loaded, ours first; they load side by side. Those that cannot are noted."""
    loading = {entry.name: stand.start(entry, form) for entry in (OURS, *entries)}
    runners: dict[str, Runner] = {}
    for name, runner in loading.items():
        try:
            results.names[name] = runner.ready()
            runners[name] = runner
            print(f"  {name}: {results.names[name]}", flush=True)
        except RunnerEnded as reason:
            runner.close()
            results.absent[name] = str(reason)
            print(f"  {name}: did not start: {reason}", flush=True)
    return runners


class Match:
    """Engines at one precision, taking turns at one workload after another."""

    def __init__(self, runners: dict[str, Runner], sizes: Sizes, results: Results) -> None:
        self.runners, self.sizes, self.results = runners, sizes, results

    def play(self, name: str, turns: int) -> None:
        """All turns of one workload; a runner that fails is out of the match."""
        if OURS.name not in self.runners:
            raise NotHere(self.results.absent[OURS.name])
        slow: set[str] = set()
        for turn in range(-1, turns):
            ours: dict[str, float] = {}
            for engine in list(self.runners):
                if engine in slow:
                    continue
                try:
                    found = self.run(engine, name, turn)
                except RunnerEnded as reason:
                    self.out(engine, str(reason))
                    continue
                if found:
                    said = ", ".join(f"{key} {figure:.4g} {CELLS[key].unit}" for key, figure in found.items())
                    print(f"    turn {turn + 1}: {engine}: {said}", flush=True)
                if engine == OURS.name:
                    ours = found
                    for key, figure in found.items():
                        self.results.ours.setdefault(key, []).append(figure)
                    continue
                for key, figure in found.items():
                    against = self.results.peers.setdefault(key, {}).setdefault(engine, Against())
                    against.figures.append(figure)
                    against.ratios.append(CELLS[key].ratio(ours[key], figure))
                    if against.ratios[0] > SLOW:
                        slow.add(engine)

    def run(self, engine: str, name: str, turn: int) -> dict[str, float]:
        """One engine's turn: its figures by cell. Turn -1 warms up and finds none."""
        runner, caching = self.runners[engine], name == "E"
        work = workload(name, turn, self.sizes)
        if turn < 0:
            runner.ask(work.to_warm_up(), caching=caching)
            return {}
        first_seconds = min(self.first(runner, f"{turn} {again}", caching) for again in range(2 if name == "A" else 1))
        answer = runner.ask(work, caching=caching)
        found = {name: CELLS[name].figure(float(answer["seconds"]), first_seconds, work)}
        self.note(engine, name, turn, answer)
        if name == "E":
            again = workload(name, turn, self.sizes, ends="again")
            seconds = float(runner.ask(again, caching=caching)["seconds"])
            found["E'"] = CELLS["E'"].figure(seconds, first_seconds, again)
        return found

    def first(self, runner: Runner, turn: str, caching: bool) -> float:
        """Seconds to A's first token; also wakes a runner that was stopped, before it is timed."""
        work = Workload(prompts=workload("A", f"first {turn}", self.sizes).prompts, outputs=(1,))
        return float(runner.ask(work, caching=caching)["seconds"])

    def note(self, engine: str, name: str, turn: int, answer: dict[str, Any]) -> None:
        """What else an answer tells: our cache's waste, and whether a peer found our tokens on A."""
        if engine == OURS.name:
            if name == "D":
                self.results.waste = max(self.results.waste, float(answer["waste"]))
            self.tokens = answer["tokens"]
        elif name == "A" and turn == 0:
            self.results.agreement[engine] = agreement(self.tokens, answer["tokens"])

    def out(self, engine: str, reason: str) -> None:
        self.runners.pop(engine).close()
        self.results.absent[engine] = reason
        print(f"  {engine}: out: {reason}", flush=True)
        if engine == OURS.name:
            raise NotHere(reason)


def one_format(stand: Stand, form: str, args: argparse.Namespace, sizes: Sizes, weights: int) -> Results:
    """Everything at one precision."""
    results = Results()
    there = [entry for entry in chosen_of(args) if is_there(stand, entry, form, results)]
    for group in list(groups(there, weights, form, stand.cache_gb)) or [[]]:
        runners = start_all(stand, group, form, results)
        try:
            match = Match(runners, sizes, results)
            for name in NAMES:
                if name in args.only:
                    match.play(name, args.turns or (1 if args.quick else 3))
        except NotHere:
            break  # without ours there is nothing to compare
        finally:
            for runner in runners.values():
                runner.close()
    for key in results.ours:
        print("\n".join(told(key, results)), flush=True)
    return results


def chosen_of(args: argparse.Namespace) -> list[Entry]:
    return [entry for entry in PEER_ENTRIES if entry.name in args.peers]


def main() -> int:
    args = arguments()
    folder = models.make("quick" if args.quick else "reference", args.models)
    spec = read_spec(folder)
    body, head = models.body_weights(spec), models.head_weights(spec)
    sizes = Sizes(cores=usable_cores(), vocab=spec.vocab, quick=args.quick)
    cache_gb = args.cache_gb or (1 if args.quick else 4)
    place = args.place.expanduser().resolve()
    stand = Stand(
        model=folder,
        place=place,
        threads=args.threads,
        cache_gb=cache_gb,
        quick=args.quick,
        ours=tuple(args.set),
    )
    print(f"{folder.name}: {body / 1e6:.0f} M weights and a head of {head / 1e6:.0f} M, {args.threads} threads")
    print(f"workloads: {sizes.told()}; prefix caching on for E; every turn brings fresh tokens")
    formats = args.formats or (("fp32",) if args.quick else FORMATS)
    if args.prepare:
        made = [is_there(stand, entry, form, Results()) for form in formats for entry in chosen_of(args)]
        print(f"{sum(made)} of {len(made)} peers can be measured")
        return 0
    seen = [limits.measure(args.threads, quick=True)]
    print(limits.line(seen[0]), flush=True)
    records: dict[str, Any] = {}
    for form in formats:
        print(f"{form}: {', '.join(OURS.variants[form].flags[1:])}", flush=True)
        results = one_format(stand, form, args, sizes, body + head)
        seen.append(limits.measure(args.threads, quick=True))
        found = shares(results, form, body, head, sizes.length(1024), best_of(seen))
        records[form] = results.record(found)
        print("  " + ", ".join(f"{share:.0%} {name}" for name, share in found.items()), flush=True)
        if "D" in results.ours:
            print(f"  {results.waste:.1%} of allocated cache slots held nothing (D; goal: under 4%)")
        same = ", ".join(f"{name} {share:.0%}" for name, share in results.agreement.items())
        print(f"  tokens of A as ours before the first that differs: {same or 'nobody to compare with'}")
    report(args, records, best_of(seen), folder.name, sizes)
    return 1 if any(OURS.name in record["not_here"] for record in records.values()) else 0


def report(args: argparse.Namespace, records: dict[str, Any], machine: dict[str, Any], name: str, sizes: Sizes) -> None:
    """The table of ratios, and the files that were asked for."""
    print("\nours over theirs (seconds: theirs over ours); * reaches the goal")
    print("\n".join(table(records)))
    print(limits.line(machine))
    record = {"model": name, "threads": args.threads, "scaled": sizes.told(), "limits": machine, "formats": records}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.svg:
        args.svg.write_text(chart(record), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
