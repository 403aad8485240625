"""What does cutting prompts into the steps of decodes give? SplitFuse on against off, under load, on long prompts.

    twofold bench splitfuse [--model DIR] [--turns N] [--request-rate R] [--json FILE] [--svg FILE]

Two servers of our own, one with --no-enable-chunked-prefill, which computes a prompt whole while everybody waits, as
vLLM did in 2023. The load is the long-prompt scenario of the vLLM and DeepSpeed note (2,600 in, 128 out, shrunk to the
model's context), sent as a Poisson process; the sides in turn, the same prompts' lengths and arrivals to both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import Any

import limits
from load import Target, closed_loop, open_loop
from load_chart import Plot, draw
from load_figures import figures
from own_server import own_server
from serve import card
from traffic import SCENARIOS, Ask, Lengths, arrivals, asks
from turns import Spread

from twofold.commands.remote import Server
from twofold.platforms import team_size

SIDES = {"on": "--enable-chunked-prefill", "off": "--no-enable-chunked-prefill"}
SHOWN = (("itl", "p99"), ("itl", "mean"), ("tpot", "p99"), ("ttft", "mean"), ("ttft", "p99"), ("e2el", "mean"))


def requests(args: argparse.Namespace, context: int, rate: float, turn: str) -> list[Ask]:
    rng = random.Random(turn)
    tokens_in, tokens_out = SCENARIOS["long"][1]
    pairs, _ = Lengths(kind="fixed", input_len=tokens_in, output_len=tokens_out).draw(args.num_prompts, rng, context)
    return asks(pairs, arrivals(args.num_prompts, rate, 1.0, rng), rng, args.vocab_size)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides' figures, turn by turn; the rate is a share of what the side with SplitFuse does when pushed."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    budget = f"--max-num-batched-tokens={args.budget}"
    with own_server(args.model, [SIDES["on"], budget]) as on, own_server(args.model, [SIDES["off"]]) as off:
        urls = {"on": on, "off": off}
        model = card(Server(on, None, "--model"), None)
        context = int(model["max_model_len"])
        targets = {side: Target(url=url, model=str(model["id"])) for side, url in urls.items()}
        for target in targets.values():
            asyncio.run(closed_loop(target, requests(args, context, float("inf"), "warm")[:4], 2))
        full = asyncio.run(open_loop(targets["on"], requests(args, context, float("inf"), "full")))
        rate = args.request_rate or args.load * figures(full)["requests_s"]
        for turn in range(args.turns):
            for side, target in targets.items():
                sent = requests(args, context, rate, f"turn {turn} {side if args.own_prompts else ''}")
                runs[side].append(figures(asyncio.run(open_loop(target, sent))))
    return {"runs": runs, "rate": rate, "context": context, "model": target.model}


def told(record: dict[str, Any]) -> None:
    print(f"{record['rate']:.2f} requests a second; off over on, so that above 1 SplitFuse is better:")
    for name, which in SHOWN:
        told = {side: [run[f"{name}_ms"] for run in record["runs"][side]] for side in SIDES}
        if not all(which in each for runs in told.values() for each in runs):
            continue  # answers of one piece of text have no time between pieces
        on, off = ([each[which] for each in told[side]] for side in SIDES)
        ratio = Spread.of([b / a for a, b in zip(on, off, strict=True)])
        record[f"{name}_{which}"] = ratio.median
        shown = f"{statistics.median(on):8,.1f} ms on, {statistics.median(off):8,.1f} ms off"
        print(f"{name.upper():<5}{which:<5} {shown}   {ratio.text('times', 2)}")
    served = [statistics.median(run["requests_s"] for run in record["runs"][side]) for side in ("on", "off")]
    print(f"requests/s {served[0]:.2f} on, {served[1]:.2f} off")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--num-prompts", type=int, default=60, help="requests of a turn (default: 60)")
    parser.add_argument("--request-rate", type=float, help="requests a second (default: --load of what can be served)")
    parser.add_argument("--load", type=float, default=0.6, help="share of the highest rate (default: 0.6)")
    parser.add_argument("--budget", type=int, default=256, help="tokens of a step with SplitFuse (default: 256)")
    parser.add_argument("--vocab-size", type=int, default=512, help="token ids are drawn below this (default: 512)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--own-prompts", action="store_true", help="draw each side's prompts and arrivals apart")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--svg", type=Path, help="draw it into this file")
    args = parser.parse_args()
    record = measure(args)
    machine = record["limits"] = limits.measure(team_size(), quick=True)
    print(limits.line(machine))
    told(record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.svg:
        lines = {
            f"SplitFuse {side}": [(share, statistics.median(run["itl_ms"][f"p{share}"] for run in runs))
                                  for share in (50, 90, 95, 99)]
            for side, runs in record["runs"].items()
        }  # fmt: skip
        plot = Plot(title="time between tokens", x="percentile", y="ms", lines=lines)
        note = f"{record['model']}, long prompts shrunk to {record['context']}, {record['rate']:.1f} requests a second"
        args.svg.write_text(draw("SplitFuse on and off", note, [plot]))


if __name__ == "__main__":
    main()
